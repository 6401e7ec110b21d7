// Go: the context package, channels and goroutines. Prints the same figures as the C programs, one sample a line.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"sort"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"
)

func wants(figure string) bool {
	return strings.Contains(figure, os.Getenv("BENCH_ONLY"))
}

func scaled(n int) int {
	scale, err := strconv.ParseFloat(os.Getenv("BENCH_SCALE"), 64)
	if err == nil {
		n = int(float64(n) * scale)
	}
	return max(n, 1)
}

func section(name string) bool {
	for _, arg := range os.Args[1:] {
		if arg == name {
			return true
		}
	}
	return len(os.Args) < 2
}

func show(figure string, value float64, unit string) {
	fmt.Printf("%s\t%.4g\t%s\n", figure, value, unit)
}

func check(ok bool, what string) {
	if !ok {
		fmt.Fprintln(os.Stderr, "bench:", what)
		os.Exit(1)
	}
}

func median(values []float64) float64 {
	sort.Float64s(values)
	n := len(values)
	return (values[(n-1)/2] + values[n/2]) / 2
}

// fit says how many fit into 40 ms, as far as a tenth of n tells; n at most. It warms up, too.
func fit(n int, fn func(n int) time.Duration) int {
	few := n/10 + 1
	began := time.Now()
	fn(few)
	return min(n, int(40e6*float64(few)/float64(time.Since(began)+1))+1)
}

// run prints what fn needs each time: the median of five, after a warm-up.
func run(figure string, n int, fn func(n int) time.Duration) {
	if !wants(figure) {
		return
	}
	n = fit(scaled(n), fn)
	var each []float64
	for i := 0; i < 5; i++ {
		each = append(each, float64(fn(n))/float64(n))
	}
	show(figure, median(each), "ns")
}

// everyRun prints what fn needs each time, every run a sample.
func everyRun(figure string, n int, fn func(n int) time.Duration) {
	if !wants(figure) {
		return
	}
	n = fit(scaled(n), fn)
	for i := 0; i < 5; i++ {
		show(figure, float64(fn(n))/float64(n), "ns")
	}
}

func goroutines(fn func(n int) time.Duration, n, count int) time.Duration {
	var ready, done sync.WaitGroup
	start := make(chan struct{})
	ready.Add(count)
	done.Add(count)
	for i := 0; i < count; i++ {
		go func() {
			fn(n/10 + 1)
			ready.Done()
			<-start
			fn(n)
			done.Done()
		}()
	}
	ready.Wait()
	began := time.Now()
	close(start)
	done.Wait()
	return time.Since(began)
}

func twoThreads(figure string, n int, fn func(n int) time.Duration) {
	if !wants(figure) {
		return
	}
	n = scaled(n)
	var ratio, each []float64
	for i := 0; i < 5; i++ {
		one := goroutines(fn, n, 1)
		two := goroutines(fn, n, 2)
		ratio = append(ratio, 2*float64(one)/float64(two))
		each = append(each, float64(two)/float64(n))
	}
	show(figure, median(ratio), "x")
	show(figure+"_each", median(each), "ns")
}

// Globals, so that the compiler knows neither their types nor their values.
var (
	server       context.Context
	serverCancel context.CancelFunc
	sinkContext  context.Context
	sinkAny      any
)

type requestKey struct{}

type request struct {
	id, user    uint64
	path, trace string
}

// Contexts.

func cancelChild(n int) time.Duration {
	began := time.Now()
	for i := 0; i < n; i++ {
		_, cancel := context.WithCancel(server)
		cancel()
	}
	return time.Since(began)
}

func timeoutChild(n int) time.Duration {
	began := time.Now()
	for i := 0; i < n; i++ {
		_, cancel := context.WithTimeout(server, 30*time.Second)
		cancel()
	}
	return time.Since(began)
}

func requestBegin(id uint64) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(server, 30*time.Second)
	return context.WithValue(ctx, requestKey{}, &request{id, id + 1, "/index", "b7ad6b71"}), cancel
}

func wholeRequest(n int) time.Duration {
	looked := 0
	began := time.Now()
	for i := 0; i < n; i++ {
		ctx, cancel := requestBegin(uint64(i))
		for step := 0; step < 5; step++ {
			if mine := ctx.Value(requestKey{}).(*request); mine.id == uint64(i) {
				looked++
			}
			for look := 0; look < 2; look++ {
				if ctx.Err() != nil {
					looked++
				}
			}
		}
		cancel()
	}
	spent := time.Since(began)
	check(looked == 5*n, "a request is wrong")
	return spent
}

func cancelMany(n, times int) time.Duration {
	child := make([]context.Context, n)
	cancels := make([]context.CancelFunc, n)
	var spent time.Duration
	for t := 0; t < times; t++ {
		parent, cancel := context.WithCancel(server)
		for i := range child {
			child[i], cancels[i] = context.WithCancel(parent)
		}
		began := time.Now()
		cancel()
		spent += time.Since(began)
		check(child[0].Err() != nil && child[n-1].Err() != nil, "a child was not canceled")
		for i := range cancels {
			cancels[i]()
		}
	}
	return spent
}

func afterStop(n int) time.Duration {
	began := time.Now()
	for i := 0; i < n; i++ {
		stop := context.AfterFunc(server, func() {})
		stop()
	}
	return time.Since(began)
}

func clock(n int) time.Duration {
	var last time.Time
	began := time.Now()
	for i := 0; i < n; i++ {
		last = time.Now()
	}
	return last.Sub(began)
}

// Allocations and bytes of one.
func count(figure string, make func(id uint64) (context.Context, context.CancelFunc)) {
	const live = 10000
	if !wants(figure+"_allocs") && !wants(figure+"_bytes") {
		return
	}
	cancels := [live]context.CancelFunc{}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for i := range cancels {
		sinkContext, cancels[i] = make(uint64(i))
	}
	runtime.ReadMemStats(&after)
	for i := range cancels {
		cancels[i]()
	}
	show(figure+"_allocs", float64(after.Mallocs-before.Mallocs)/live, "")
	show(figure+"_bytes", float64(after.TotalAlloc-before.TotalAlloc)/live, "B")
}

func contexts() {
	run("cancel_child", 500000, cancelChild)
	run("timeout_child", 300000, timeoutChild)
	run("request", 200000, wholeRequest)
	run("clock", 1000000, clock)
	run("cancel_each_100", 200000, func(n int) time.Duration { return cancelMany(100, n/100+1) })
	run("cancel_each_10k", 200000, func(n int) time.Duration { return cancelMany(10000, n/10000+1) })
	if wants("cancel_each_1m") {
		n := scaled(1000000)
		show("cancel_each_1m", float64(cancelMany(n, 1))/float64(n), "ns")
		runtime.GC()
	}
	run("after_stop", 300000, afterStop)
	twoThreads("cancel_child_2t", 200000, cancelChild)
	twoThreads("timeout_child_2t", 100000, timeoutChild)
	count("cancel_child", func(uint64) (context.Context, context.CancelFunc) { return context.WithCancel(server) })
	count("timeout_child", func(uint64) (context.Context, context.CancelFunc) {
		return context.WithTimeout(server, 30*time.Second)
	})
	count("request", requestBegin)
}

// Polling.

func errLoop(n int) time.Duration {
	ctx := sinkContext
	done := 0
	began := time.Now()
	for i := 0; i < n; i++ {
		if ctx.Err() != nil {
			done++
		}
	}
	spent := time.Since(began)
	check(done == 0, "done too early")
	return spent
}

func polling() {
	var cancel context.CancelFunc
	sinkContext, cancel = context.WithTimeout(server, time.Hour)
	run("err_loop", 10000000, errLoop)
	cancel()
}

// Values.

type valueKey int

func lookUp(ctx context.Context) func(n int) time.Duration {
	var key any = valueKey(0)
	return func(n int) time.Duration {
		began := time.Now()
		for i := 0; i < n; i++ {
			sinkAny = ctx.Value(key)
		}
		return time.Since(began)
	}
}

func values() {
	value := &request{1, 2, "anna", ""}
	chain := make([]context.Context, 1000)
	cancels := make([]context.CancelFunc, 1000)
	chain[0] = context.WithValue(context.Background(), valueKey(0), value)
	for i := 1; i < len(chain); i++ {
		chain[i], cancels[i] = context.WithCancel(chain[i-1])
	}
	run("value_depth_1", 5000000, lookUp(chain[0]))
	run("value_depth_12", 1000000, lookUp(chain[11]))
	run("value_depth_1000", 20000, lookUp(chain[999]))
	for i := 1; i < len(chain); i++ {
		cancels[i]()
	}
	ctx := context.Background()
	for i := 0; i < 12; i++ {
		ctx = context.WithValue(ctx, valueKey(i), value)
	}
	run("value_keys_12", 1000000, lookUp(ctx))
	run("value_attach", 1000000, func(n int) time.Duration {
		parent := context.Background()
		began := time.Now()
		for i := 0; i < n; i++ {
			sinkContext = context.WithValue(parent, valueKey(0), value)
		}
		return time.Since(began)
	})
}

// Timers.

func timers() {
	if !wants("timers") {
		return
	}
	n := scaled(1000000)
	cancels := make([]context.CancelFunc, n)
	var before, after runtime.MemStats
	var makes, ends []float64
	for round := 0; round <= 2; round++ {
		runtime.GC()
		runtime.ReadMemStats(&before)
		began := time.Now()
		for i := range cancels {
			timeout := 30*time.Second + time.Duration(i*7919%30000)*time.Millisecond
			_, cancels[i] = context.WithTimeout(server, timeout)
		}
		made := time.Since(began)
		if round == 0 {
			runtime.GC()
			runtime.ReadMemStats(&after)
		}
		ending := time.Now()
		for i := range cancels {
			cancels[i]()
			cancels[i] = nil
		}
		ended := time.Since(ending)
		makeEach, endEach := float64(made)/float64(n), float64(ended)/float64(n)
		if round == 0 {
			show("timers_make_cold", makeEach, "ns")
			show("timers_end_cold", endEach, "ns")
			show("timers_bytes", (float64(after.HeapAlloc)-float64(before.HeapAlloc))/float64(n), "B")
		} else {
			makes, ends = append(makes, makeEach), append(ends, endEach)
		}
	}
	show("timers_make", median(makes), "ns")
	show("timers_end", median(ends), "ns")
}

// A channel as a semaphore.
func semaphore() {
	permits := make(chan struct{}, 8)
	run("sem_pair", 5000000, func(n int) time.Duration {
		began := time.Now()
		for i := 0; i < n; i++ {
			select {
			case permits <- struct{}{}:
			case <-server.Done():
				return 0
			}
			<-permits
		}
		return time.Since(began)
	})
	var mutex sync.Mutex
	run("mutex_pair", 5000000, func(n int) time.Duration {
		began := time.Now()
		for i := 0; i < n; i++ {
			mutex.Lock()
			mutex.Unlock()
		}
		return time.Since(began)
	})
}

// The usual pool: a bounded channel of tasks and a number of goroutines. A task's context has the pool's deadline and
// ends with the pool; that it should also carry the request's values but not its cancellation, as in the C program,
// would cost two more wrappers, which this one does not pay.

type task struct {
	parent context.Context
	fn     func(ctx context.Context) error
}

type pool struct {
	tasks    chan task
	lifetime context.Context
	timeout  time.Duration
	workers  sync.WaitGroup
}

func newPool(workers int, timeout time.Duration) *pool {
	p := &pool{tasks: make(chan task, 1024), lifetime: server, timeout: timeout}
	p.workers.Add(workers)
	for i := 0; i < workers; i++ {
		go p.work()
	}
	return p
}

func (p *pool) work() {
	defer p.workers.Done()
	for t := range p.tasks {
		if p.timeout == 0 {
			t.fn(p.lifetime)
			continue
		}
		ctx, cancel := context.WithTimeout(p.lifetime, p.timeout)
		t.fn(ctx)
		cancel()
	}
}

func (p *pool) close() {
	close(p.tasks)
	p.workers.Wait()
}

func noOp(ctx context.Context) error { return ctx.Err() }

func flood(p *pool, fn func(ctx context.Context) error, n int) time.Duration {
	done := make(chan struct{})
	began := time.Now()
	for i := 1; i < n; i++ {
		p.tasks <- task{server, fn}
	}
	p.tasks <- task{server, func(context.Context) error { close(done); return nil }}
	<-done
	return time.Since(began)
}

func floodOf(figure string, workers int, timeout time.Duration, fn func(ctx context.Context) error, n int) {
	if !wants(figure) {
		return
	}
	n = scaled(n)
	p := newPool(workers, timeout)
	flood(p, fn, n/2+1)
	for i := 0; i < 5; i++ {
		show(figure, float64(flood(p, fn, n))/float64(n), "ns")
	}
	p.close()
}

func floodFigure(figure string, workers int, timeout time.Duration) {
	floodOf(figure, workers, timeout, noOp, 100000)
}

// steps computes: each step waits for the one before.
func steps(n int) uint64 {
	x := uint64(n)
	for i := 0; i < n; i++ {
		x = x*6364136223846793005 + 1442695040888963407
	}
	return x
}

// stepsPerMicrosecond is the best of many tries, since whatever disturbs one makes it longer.
func stepsPerMicrosecond() int {
	const some = 20000
	best := time.Hour
	for i := 0; i < 2000; i++ {
		began := time.Now()
		seed.Store(steps(some))
		best = min(best, time.Since(began))
	}
	return int(some * 1e3 / float64(best))
}

// workFigures floods pools with tasks that compute.
func workFigures() {
	each := stepsPerMicrosecond()
	computing := func(us int) func(ctx context.Context) error {
		return func(ctx context.Context) error {
			if steps(us*each) == 1 {
				return context.Canceled
			}
			return ctx.Err()
		}
	}
	for _, workers := range []int{2, 8} {
		floodOf(fmt.Sprintf("pool_1us_%d", workers), workers, 30*time.Second, computing(1), 100000)
		floodOf(fmt.Sprintf("pool_10us_%d", workers), workers, 30*time.Second, computing(10), 20000)
		floodOf(fmt.Sprintf("pool_100us_%d", workers), workers, 30*time.Second, computing(100), 2000)
	}
}

// Clocks of Linux.
const (
	clockProcess = 2
	clockThread  = 3
)

func processorTime(clock uintptr) time.Duration {
	var now syscall.Timespec
	syscall.RawSyscall(syscall.SYS_CLOCK_GETTIME, clock, uintptr(unsafe.Pointer(&now)), 0)
	return time.Duration(now.Nano())
}

const (
	burstSize  = 3
	burstEvery = 100 * time.Microsecond
)

// paced calls burst 10,000 times a second; the nanoseconds of processor for one operation. With a spinning submitter:
// of all other threads, and of this one inside burst. With a sleeping one: of the whole process.
func paced(spin bool, burst func()) float64 {
	bursts := scaled(5000)
	runtime.GC()
	if spin { // its thread runs nothing else, so that the thread's clock is its own
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
	}
	var used time.Duration
	next := time.Now()
	all, own := processorTime(clockProcess), processorTime(clockThread)
	for i := 0; i < bursts; i++ {
		next = next.Add(burstEvery)
		if spin {
			began := time.Now()
			for began.Before(next) {
				began = time.Now()
			}
			burst()
			used += min(time.Since(began), burstEvery)
		} else {
			// time.Sleep would round up to a millisecond and turn ten bursts into one.
			if wait := time.Until(next); wait > 0 {
				timespec := syscall.NsecToTimespec(int64(wait))
				syscall.Nanosleep(&timespec, nil)
			}
			burst()
		}
	}
	own = processorTime(clockThread) - own
	all = processorTime(clockProcess) - all
	if spin {
		all -= own
	}
	return float64(used+all) / float64(bursts*burstSize)
}

// Garbage of the submitter is the cost of the submitter, so nothing is subtracted but the pacing.
func pacedFigure(figure string, burst func()) {
	nothing := paced(true, func() {})
	show(figure, paced(true, burst)-nothing, "ns")
	show(figure+"_sleeping", paced(false, burst), "ns")
}

func pools() {
	floodFigure("pool_2", 2, 30*time.Second)
	floodFigure("pool_8", 8, 30*time.Second)
	floodFigure("pool_100", 100, 30*time.Second)
	floodFigure("pool_plain_2", 2, 0)
	floodFigure("pool_plain_8", 8, 0)
	workFigures()
	if wants("pool_allocs") {
		var before, after runtime.MemStats
		n := 100000
		p := newPool(8, 30*time.Second)
		flood(p, noOp, n)
		runtime.ReadMemStats(&before)
		flood(p, noOp, n)
		runtime.ReadMemStats(&after)
		show("pool_allocs", float64(after.Mallocs-before.Mallocs)/float64(n), "")
		p.close()
	}
	if wants("thread_each") {
		run("thread_each", 200000, func(n int) time.Duration {
			done := make(chan struct{})
			began := time.Now()
			for i := 0; i < n; i++ {
				go func() { done <- struct{}{} }()
				<-done
			}
			return time.Since(began)
		})
	}
	if wants("detached") {
		p := newPool(2, 0)
		flood(p, noOp, 10000)
		pacedFigure("detached", func() {
			for i := 0; i < burstSize; i++ {
				p.tasks <- task{server, noOp}
			}
		})
		p.close()
		pacedFigure("detached_goroutine", func() {
			for i := 0; i < burstSize; i++ {
				go noOp(server)
			}
		})
		show("detached_nothing_sleeping", paced(false, func() {}), "ns")
	}
}

// Waiting: from cancel() until a goroutine parked on Done() runs.
// deadlines prints how late 16 goroutines run that wait for deadlines of 1 to 10 ms, beside so many busy goroutines.
func deadlines(beside string, busy int) {
	const sleepers, waits = 16, 20
	if !wants("deadline_"+beside+"_p50") && !wants("deadline_"+beside+"_p99") {
		return
	}
	turns := min(scaled(5), 5)
	var over atomic.Bool
	var ended sync.WaitGroup
	for i := 0; i < busy; i++ {
		ended.Add(1)
		go func() {
			for !over.Load() {
			}
			ended.Done()
		}()
	}
	late := make([]float64, sleepers*waits*turns)
	for turn := 0; turn < turns; turn++ {
		var slept sync.WaitGroup
		for i := 0; i < sleepers; i++ {
			mine := late[(turn*sleepers+i)*waits:][:waits]
			seed := uint32(turn*sleepers + i)
			slept.Add(1)
			go func() {
				for j := range mine {
					seed = seed*1664525 + 1013904223
					until := time.Now().Add(time.Duration(1000000 + seed>>8%9000000))
					ctx, cancel := context.WithTimeout(server, time.Until(until))
					<-ctx.Done()
					mine[j] = float64(time.Since(until)) / 1000
					cancel()
				}
				slept.Done()
			}()
		}
		slept.Wait()
	}
	over.Store(true)
	ended.Wait()
	show("deadline_"+beside+"_p50", median(late), "us") // sorts
	show("deadline_"+beside+"_p99", late[len(late)*99/100], "us")
}

func waiting() {
	wakes()
	deadlines("idle", 0)
	deadlines("busy_2", 2)
	deadlines("busy_8", 8)
}

func wakes() {
	if !wants("wait_wake") {
		return
	}
	n := scaled(1000)
	var took []float64
	woken := make(chan time.Time)
	for i := 0; i < n; i++ {
		ctx, cancel := context.WithCancel(server)
		go func() {
			<-ctx.Done()
			woken <- time.Now()
		}()
		time.Sleep(50 * time.Microsecond)
		for until := time.Now().Add(20 * time.Microsecond); time.Now().Before(until); {
		}
		began := time.Now()
		cancel()
		took = append(took, float64((<-woken).Sub(began)))
	}
	show("wait_wake", median(took), "ns")
}

// Groups and spawning. What needs golang.org/x stands in peer_go_modules.go.

// compute takes a microsecond or so: its steps wait for each other.
func compute(x uint64) uint64 {
	for i := 0; i < 1000; i++ {
		x = x*6364136223846793005 + 1442695040888963407
	}
	return x
}

var seed atomic.Uint64

func someOp(ctx context.Context) error {
	if compute(seed.Load()) == 1 {
		return context.Canceled
	}
	return ctx.Err()
}

// A group by hand: permits, a WaitGroup, the first error and a context that it cancels.
func groupByHand(n int) time.Duration {
	began := time.Now()
	ctx, cancel := context.WithCancelCause(server)
	permits := make(chan struct{}, 16)
	var all sync.WaitGroup
	var once sync.Once
	var failed error
	for i := 0; i < n; i++ {
		permits <- struct{}{}
		all.Add(1)
		go func() {
			defer all.Done()
			if err := noOp(ctx); err != nil {
				once.Do(func() {
					failed = err
					cancel(err)
				})
			}
			<-permits
		}()
	}
	all.Wait()
	cancel(nil)
	check(failed == nil, "a task failed")
	return time.Since(began)
}

const spawnBurst = 64

// spawnBursts starts goroutines in bursts and waits for each burst: the whole time, or only that of starting them.
func spawnBursts(n int, onlyCalls bool) time.Duration {
	bursts := n/spawnBurst + 1
	var all sync.WaitGroup
	var calls time.Duration
	began := time.Now()
	for i := 0; i < bursts; i++ {
		calling := time.Now()
		for j := 0; j < spawnBurst; j++ {
			all.Add(1)
			go func() {
				noOp(server)
				all.Done()
			}()
		}
		calls += time.Since(calling)
		all.Wait()
	}
	spent := time.Since(began)
	if onlyCalls {
		spent = calls
	}
	return spent * time.Duration(n) / time.Duration(bursts*spawnBurst)
}

func groups() {
	groupModules()
	everyRun("group_by_hand", 200000, groupByHand)
	everyRun("go_spawn", 200000, func(n int) time.Duration { return spawnBursts(n, false) })
	everyRun("go_call", 200000, func(n int) time.Duration { return spawnBursts(n, true) })
	everyRun("go_each", 100000, func(n int) time.Duration {
		var all sync.WaitGroup
		began := time.Now()
		for i := 0; i < n; i++ {
			all.Add(1)
			go func() {
				noOp(server)
				all.Done()
			}()
			all.Wait()
		}
		return time.Since(began)
	})
}

// Channels.

const channelCapacity = 1024

// pass sends n items through a channel, from so many senders to so many receivers. cancellable: each send and receive
// is a select with Done, which is what a send or receive that can be canceled is in Go.
func pass(n, pairs int, cancellable bool) time.Duration {
	items := make(chan uint64, channelCapacity)
	start := make(chan struct{})
	var ready, over sync.WaitGroup
	sent, received := make([]uint64, pairs), make([]uint64, pairs)
	each := (n + pairs - 1) / pairs
	done := server.Done()
	ready.Add(2 * pairs)
	over.Add(2 * pairs)
	for p := 0; p < pairs; p++ {
		go func(p int) {
			sum := uint64(0)
			ready.Done()
			<-start
			if cancellable {
				for i := 0; i < each; i++ {
					select {
					case items <- uint64(i):
						sum += uint64(i)
					case <-done:
					}
				}
			} else {
				for i := 0; i < each; i++ {
					items <- uint64(i)
					sum += uint64(i)
				}
			}
			sent[p] = sum
			over.Done()
		}(p)
		go func(p int) {
			sum := uint64(0)
			ready.Done()
			<-start
			if cancellable {
				for i := 0; i < each; i++ {
					select {
					case item := <-items:
						sum += item
					case <-done:
					}
				}
			} else {
				for i := 0; i < each; i++ {
					sum += <-items
				}
			}
			received[p] = sum
			over.Done()
		}(p)
	}
	ready.Wait()
	began := time.Now()
	close(start)
	over.Wait()
	spent := time.Since(began)
	balance := uint64(0)
	for p := range sent {
		balance += sent[p] - received[p]
	}
	check(balance == 0 && len(items) == 0, "items were lost")
	return spent
}

func pingpong(n int) time.Duration {
	there, back := make(chan uint64), make(chan uint64)
	go func() {
		for i := 0; i < n; i++ {
			back <- <-there
		}
	}()
	began := time.Now()
	for i := 0; i < n; i++ {
		there <- uint64(i)
		check(<-back == uint64(i), "an item did not come back")
	}
	return time.Since(began)
}

func tryPair(n int) time.Duration {
	items := make(chan uint64, channelCapacity)
	missed := 0
	began := time.Now()
	for i := 0; i < n; i++ {
		select {
		case items <- uint64(i):
		default:
			missed++
		}
		select {
		case <-items:
		default:
			missed++
		}
	}
	spent := time.Since(began)
	check(missed == 0, "an item was missed")
	return spent
}

// selectReady selects from channels that all have items; filling them up does not count.
func selectReady(n, channels int) time.Duration {
	c := [8]chan uint64{}
	for i := range c {
		c[i] = make(chan uint64, channelCapacity)
	}
	done := server.Done()
	var spent time.Duration
	for left := n; left > 0; left -= channelCapacity {
		for i := 0; i < channels; i++ {
			for len(c[i]) < channelCapacity {
				c[i] <- 1
			}
		}
		some := min(left, channelCapacity)
		began := time.Now()
		if channels == 2 {
			for i := 0; i < some; i++ {
				select {
				case <-c[0]:
				case <-c[1]:
				case <-done:
				}
			}
		} else {
			for i := 0; i < some; i++ {
				select {
				case <-c[0]:
				case <-c[1]:
				case <-c[2]:
				case <-c[3]:
				case <-c[4]:
				case <-c[5]:
				case <-c[6]:
				case <-c[7]:
				case <-done:
				}
			}
		}
		spent += time.Since(began)
	}
	return spent
}

func channels() {
	everyRun("chan_1_1", 2000000, func(n int) time.Duration { return pass(n, 1, false) })
	everyRun("chan_4_4", 1000000, func(n int) time.Duration { return pass(n, 4, false) })
	everyRun("chan_1_1_select", 1000000, func(n int) time.Duration { return pass(n, 1, true) })
	everyRun("chan_4_4_select", 1000000, func(n int) time.Duration { return pass(n, 4, true) })
	run("chan_pingpong", 100000, pingpong)
	run("chan_try", 2000000, tryPair)
	run("select_2", 500000, func(n int) time.Duration { return selectReady(n, 2) })
	run("select_8", 500000, func(n int) time.Duration { return selectReady(n, 8) })
}

// Hand-over: two goroutines that take turns. Side 0 counts, side 1 is its partner, which answers each give with one.

const (
	handRuns   = 5
	handWarm   = 100
	handSpan   = 40 * time.Millisecond
	handPause  = 200 * time.Microsecond
	handPaused = 150
)

// A hand is a way to hand over. With alone, give(0) starts something that calls the pause, and take(0) waits for it.
type hand struct {
	name       string
	give, take func(side int)
	alone      bool
}

// handPausing is what a side does between two waits: compute for the span that was asked for, or nothing.
var handPausing time.Duration

func handPauses() {
	if handPausing == 0 {
		return
	}
	for until := time.Now().Add(handPausing); time.Now().Before(until); {
	}
}

func handRounds(h hand, n int) {
	for i := 0; i < n; i++ {
		handPauses()
		h.give(0)
		h.take(0)
	}
}

// handShort is the time of a round without pauses.
func handShort(h hand) float64 {
	span := time.Duration(scaled(int(handSpan)))
	handRounds(h, handWarm)
	began := time.Now()
	for rounds := 20; ; rounds += 20 {
		handRounds(h, 20)
		if spent := time.Since(began); spent >= span {
			return float64(spent) / float64(rounds)
		}
	}
}

// handLong is the time of a round with two pauses, without them: the median.
func handLong(h hand) float64 {
	var took []float64
	handRounds(h, handWarm/10)
	for i := min(scaled(handPaused), handPaused); i > 0; i-- {
		began := time.Now()
		handRounds(h, 1)
		took = append(took, float64(time.Since(began)-2*handPausing))
	}
	return median(took)
}

func handRun(fresh func() hand, pause time.Duration) float64 {
	h := fresh()
	over := false // of whoever's turn it is
	ended := make(chan struct{})
	handPausing = pause
	if !h.alone {
		go func() {
			defer close(ended)
			for {
				h.take(1)
				if over {
					return
				}
				handPauses()
				h.give(1)
			}
		}()
	}
	measure := handShort
	if pause > 0 {
		measure = handLong
	}
	each := measure(h)
	if !h.alone {
		over = true
		h.give(0)
		<-ended
	}
	return each
}

func overChannels(name string, capacity int) hand {
	c := [2]chan uint64{make(chan uint64, capacity), make(chan uint64, capacity)}
	return hand{name: name,
		give: func(side int) { c[side] <- uint64(side) },
		take: func(side int) { check(<-c[1-side] == uint64(1-side), "a wrong item came") }}
}

func handRendezvous() hand { return overChannels("rendezvous", 0) }
func handChannel() hand    { return overChannels("channel", 1) }

// handSelect has Done as one more case, as a select of the C library has its context.
func handSelect() hand {
	c := [2]chan uint64{make(chan uint64, 1), make(chan uint64, 1)}
	quiet := make(chan uint64)
	return hand{name: "select",
		give: func(side int) { c[side] <- uint64(side) },
		take: func(side int) {
			select {
			case <-c[1-side]:
			case <-quiet:
				check(false, "a wrong item came")
			case <-server.Done():
				check(false, "canceled")
			}
		}}
}

func handCancel() hand {
	type round struct {
		ctx    context.Context
		cancel context.CancelFunc
	}
	make1 := func() round {
		ctx, cancel := context.WithCancel(server)
		return round{ctx, cancel}
	}
	// Of each side: this round's and the next, which is made before this one is canceled.
	turns := [2][2]round{{make1()}, {make1()}}
	var given, taken [2]int
	return hand{name: "cancel",
		give: func(side int) {
			now := given[side] % 2
			given[side]++
			turns[side][1-now] = make1()
			turns[side][now].cancel()
		},
		take: func(side int) {
			other := 1 - side
			<-turns[other][taken[other]%2].ctx.Done()
			taken[other]++
		}}
}

func handGo() hand {
	back := make(chan uint64, 1)
	return hand{name: "go", alone: true,
		give: func(int) { go func() { handPauses(); back <- 1 }() },
		take: func(int) { <-back }}
}

func handGoWait() hand {
	var all sync.WaitGroup
	return hand{name: "go_wait", alone: true,
		give: func(int) {
			all.Add(1)
			go func() {
				handPauses()
				all.Done()
			}()
		},
		take: func(int) { all.Wait() }}
}

// hands prints each way, every run a sample: microseconds there and back, with so many threads for goroutines.
func hands(kind string, threads int, pause time.Duration) {
	ways := append([]func() hand{handRendezvous, handChannel, handSelect, handCancel, handGo, handGoWait}, handModules...)
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(threads))
	for i := 0; i < handRuns; i++ {
		for _, fresh := range ways {
			if figure := "hand_" + kind + "_" + fresh().name; wants(figure) {
				show(figure, handRun(fresh, pause)/1e3, "us")
			}
		}
	}
}

func handover() {
	hands("1", 1, 0)
	hands("2", 2, 0)
	hands("long", 2, handPause)
}

// Flow.

// A token bucket by hand: no module, no waiting, no reservations.
type bucket struct {
	mu                  sync.Mutex
	rate, burst, tokens float64
	last                time.Time
}

func (b *bucket) allow() bool {
	now := time.Now()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.tokens = min(b.burst, b.tokens+now.Sub(b.last).Seconds()*b.rate)
	b.last = now
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}

func bucketAllow(n int) time.Duration {
	b := &bucket{rate: 1e7, burst: 1e9, tokens: 1e9, last: time.Now()}
	refused := 0
	began := time.Now()
	for i := 0; i < n; i++ {
		if !b.allow() {
			refused++
		}
	}
	spent := time.Since(began)
	check(refused == 0, "no token")
	return spent
}

// The usual batcher: a channel, and a goroutine that gathers into a slice and flushes when that is full or a ticker
// ticks.

type row struct {
	id    uint64
	value float64
}

type batcher struct {
	rows  chan row
	flush func(rows []row)
	over  chan struct{}
}

func newBatcher(maxItems, queue int, maxDelay time.Duration, flush func(rows []row)) *batcher {
	b := &batcher{make(chan row, queue), flush, make(chan struct{})}
	go b.work(maxItems, maxDelay)
	return b
}

func (b *batcher) work(maxItems int, maxDelay time.Duration) {
	defer close(b.over)
	ticker := time.NewTicker(maxDelay)
	defer ticker.Stop()
	rows := make([]row, 0, maxItems)
	flush := func() {
		if len(rows) > 0 {
			b.flush(rows)
			rows = rows[:0]
		}
	}
	for {
		select {
		case r, more := <-b.rows:
			if !more {
				flush()
				return
			}
			rows = append(rows, r)
			if len(rows) == maxItems {
				flush()
			}
		case <-ticker.C:
			flush()
		}
	}
}

func (b *batcher) add(r row) bool {
	select {
	case b.rows <- r:
		return true
	default:
		return false
	}
}

func (b *batcher) addWait(ctx context.Context, r row) error {
	select {
	case b.rows <- r:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (b *batcher) close() {
	close(b.rows)
	<-b.over
}

// batchAdd adds all but the last of a batch; that one and the flush do not count.
func batchAdd(n int) time.Duration {
	const batch = 1000
	flushed := make(chan int)
	b := newBatcher(batch, 4*batch, time.Second, func(rows []row) { flushed <- len(rows) })
	batches := n/(batch-1) + 1
	var spent time.Duration
	refused := 0
	for i := 0; i < batches; i++ {
		began := time.Now()
		for j := 1; j < batch; j++ {
			if !b.add(row{uint64(j), 0.5}) {
				refused++
			}
		}
		spent += time.Since(began)
		b.add(row{0, 0.5})
		for got := 0; got < batch; {
			got += <-flushed
		}
	}
	b.close()
	check(refused == 0, "a row was not taken")
	return spent * time.Duration(n) / time.Duration(batches*(batch-1))
}

func batchFlush(n int) time.Duration {
	written, failed := 0, 0
	began := time.Now()
	b := newBatcher(100, 400, time.Second, func(rows []row) { written += len(rows) })
	for i := 0; i < n; i++ {
		if b.addWait(server, row{uint64(i), 0.5}) != nil {
			failed++
		}
	}
	b.close()
	spent := time.Since(began)
	check(written == n && failed == 0, "rows were lost")
	return spent
}

func flow() {
	flowModules()
	run("limiter_allow_by_hand", 1000000, bucketAllow)
	run("batch_add", 1000000, batchAdd)
	everyRun("batch_flush", 1000000, batchFlush)
}

// Services.

// actors run together and stop together, in the manner of oklog/run: each has a function that runs, and one that makes
// that return. When the first has returned all are interrupted, and waited for.
type actor struct {
	execute   func() error
	interrupt func(error)
}

type actors []actor

func (a actors) run() error {
	results := make(chan error, len(a))
	for _, one := range a {
		go func(one actor) { results <- one.execute() }(one)
	}
	first := <-results
	for _, one := range a {
		one.interrupt(first)
	}
	for i := 1; i < len(a); i++ {
		<-results
	}
	return first
}

// stopActors runs so many actors parked on their contexts, and one that waits for SIGTERM: from the signal until all
// is over.
func stopActors(n int, settle time.Duration) time.Duration {
	var parked atomic.Int64
	var group actors
	for i := 0; i < n; i++ {
		ctx, cancel := context.WithCancel(server)
		group = append(group, actor{
			func() error {
				parked.Add(1)
				<-ctx.Done()
				return ctx.Err()
			},
			func(error) { cancel() },
		})
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM)
	ctx, cancel := context.WithCancel(server)
	group = append(group, actor{
		func() error {
			parked.Add(1)
			select {
			case <-signals:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		},
		func(error) { cancel() },
	})
	var began time.Time
	sent := make(chan struct{})
	go func() {
		for parked.Load() != int64(n+1) {
			time.Sleep(100 * time.Microsecond)
		}
		time.Sleep(settle)
		began = time.Now()
		syscall.Kill(syscall.Getpid(), syscall.SIGTERM)
		close(sent)
	}()
	check(group.run() == nil, "the group did not end well")
	ended := time.Now()
	<-sent
	signal.Stop(signals)
	return ended.Sub(began)
}

// stopGoroutines stops n goroutines that are parked on one context.
func stopGoroutines(n int) time.Duration {
	ctx, cancel := context.WithCancel(server)
	var all sync.WaitGroup
	var parked atomic.Int64
	all.Add(n)
	for i := 0; i < n; i++ {
		go func() {
			defer all.Done()
			parked.Add(1)
			<-ctx.Done()
		}()
	}
	for parked.Load() != int64(n) {
		time.Sleep(100 * time.Microsecond)
	}
	time.Sleep(20 * time.Millisecond)
	began := time.Now()
	cancel()
	all.Wait()
	return time.Since(began)
}

// drainAll calls n drain functions side by side.
func drainAll(n int) time.Duration {
	began := time.Now()
	ctx, cancel := context.WithTimeout(server, 25*time.Second)
	var all sync.WaitGroup
	all.Add(n)
	for i := 0; i < n; i++ {
		go func() {
			defer all.Done()
			noOp(ctx)
		}()
	}
	all.Wait()
	cancel()
	return time.Since(began)
}

func stops(figure string, times int, unit time.Duration, fn func() time.Duration) {
	if !wants(figure) {
		return
	}
	fn()
	var took []float64
	for i := 0; i < times; i++ {
		took = append(took, float64(fn())/float64(unit))
	}
	name := "us"
	if unit == time.Millisecond {
		name = "ms"
	}
	if times > 3 {
		took = []float64{median(took)}
	}
	for _, each := range took {
		show(figure, each, name)
	}
}

func services() {
	stops("app_shutdown_flat", scaled(50), time.Microsecond, func() time.Duration {
		return stopActors(3, time.Millisecond)
	})
	stops("stop_1000_drain", 3, time.Millisecond, func() time.Duration { return drainAll(1000) })
	stops("stop_1000_run", 3, time.Millisecond, func() time.Duration { return stopGoroutines(1000) })
	stops("stop_1000_actors", 3, time.Millisecond, func() time.Duration {
		return stopActors(1000, 20*time.Millisecond)
	})
}

func main() {
	server, serverCancel = context.WithCancel(context.Background())
	for _, s := range []struct {
		name string
		run  func()
	}{
		{"context", contexts}, {"polling", polling}, {"values", values}, {"timers", timers},
		{"semaphore", semaphore}, {"pool", pools}, {"waiting", waiting}, {"group", groups}, {"channel", channels},
		{"handover", handover}, {"flow", flow}, {"service", services},
	} {
		if section(s.name) {
			s.run()
		}
	}
	serverCancel()
}
