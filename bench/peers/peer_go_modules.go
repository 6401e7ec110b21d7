//go:build modules

// The figures that need golang.org/x: built with `-tags modules` where go.mod's modules can be had, else
// peer_go_plain.go takes the place of this.
package main

import (
	"context"
	"time"

	"golang.org/x/sync/errgroup"
	weighted "golang.org/x/sync/semaphore"
	"golang.org/x/time/rate"
)

// errgroupOf runs a group of n tasks, from its making until it is over.
func errgroupOf(n int, fn func(ctx context.Context) error) time.Duration {
	began := time.Now()
	group, ctx := errgroup.WithContext(server)
	group.SetLimit(16)
	for i := 0; i < n; i++ {
		group.Go(func() error { return fn(ctx) })
	}
	check(group.Wait() == nil, "a task failed")
	return time.Since(began)
}

func groupModules() {
	everyRun("group_pool", 200000, func(n int) time.Duration { return errgroupOf(n, noOp) })
	everyRun("group_work", 100000, func(n int) time.Duration { return errgroupOf(n, someOp) })
}

var handModules = []func() hand{handSemaphore, handGroup}

// handSemaphore has all permits taken. There is one, which each give releases and each take acquires.
func handSemaphore() hand {
	s := [2]*weighted.Weighted{weighted.NewWeighted(1), weighted.NewWeighted(1)}
	for _, one := range s {
		check(one.TryAcquire(1), "no permit")
	}
	return hand{name: "semaphore",
		give: func(side int) { s[side].Release(1) },
		take: func(side int) { check(s[1-side].Acquire(server, 1) == nil, "no permit came") }}
}

func handGroup() hand {
	var group *errgroup.Group
	return hand{name: "group", alone: true,
		give: func(int) {
			group, _ = errgroup.WithContext(server)
			group.Go(func() error {
				handPauses()
				return nil
			})
		},
		take: func(int) { check(group.Wait() == nil, "a task failed") }}
}

func limiterAllow(n int) time.Duration {
	limiter := rate.NewLimiter(1e7, 1e9)
	refused := 0
	began := time.Now()
	for i := 0; i < n; i++ {
		if !limiter.Allow() {
			refused++
		}
	}
	spent := time.Since(began)
	check(refused == 0, "no token")
	return spent
}

func limiterWait(n int) time.Duration {
	limiter := rate.NewLimiter(1e7, 1e9)
	failed := 0
	began := time.Now()
	for i := 0; i < n; i++ {
		if limiter.Wait(server) != nil {
			failed++
		}
	}
	spent := time.Since(began)
	check(failed == 0, "no token")
	return spent
}

func flowModules() {
	run("limiter_allow", 1000000, limiterAllow)
	run("limiter_wait", 1000000, limiterWait)
}
