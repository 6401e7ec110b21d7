// tokio: two tasks that take turns, on two workers and in one thread. Prints the same figures as the C programs.
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{mpsc, oneshot, Semaphore};

const RUNS: usize = 5;
const WARM: usize = 100;
const SPAN: Duration = Duration::from_millis(40);
const PAUSE: Duration = Duration::from_micros(200);
const PAUSED: usize = 150;

fn wants(figure: &str) -> bool {
    figure.contains(&std::env::var("BENCH_ONLY").unwrap_or_default())
}

fn scale() -> f64 {
    std::env::var("BENCH_SCALE")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(1.0)
}

// What a side does between two waits: compute for this span.
fn compute(pause: Duration) {
    if pause.is_zero() {
        return;
    }
    let began = Instant::now();
    while began.elapsed() < pause {}
}

// What this side gives and takes. Returns false if the other side has ended.
trait Side: Send + 'static {
    fn give(&mut self) -> impl Future<Output = ()> + Send;
    fn take(&mut self) -> impl Future<Output = bool> + Send;
}

struct Channel(mpsc::Sender<u64>, mpsc::Receiver<u64>);

fn channels() -> (Channel, Channel) {
    let (to_b, from_a) = mpsc::channel(1);
    let (to_a, from_b) = mpsc::channel(1);
    (Channel(to_b, from_b), Channel(to_a, from_a))
}

impl Side for Channel {
    async fn give(&mut self) {
        let _ = self.0.send(1).await; // fails once the other side has ended
    }
    async fn take(&mut self) -> bool {
        self.1.recv().await.is_some()
    }
}

// Its sender is kept, so that the second channel is quiet and not closed.
struct Select(Channel, #[allow(dead_code)] mpsc::Sender<u64>, mpsc::Receiver<u64>);

fn selects() -> (Select, Select) {
    let (a, b) = channels();
    let (quiet_a, quiet_b) = (mpsc::channel(1), mpsc::channel(1));
    (Select(a, quiet_a.0, quiet_a.1), Select(b, quiet_b.0, quiet_b.1))
}

impl Side for Select {
    async fn give(&mut self) {
        self.0.give().await
    }
    async fn take(&mut self) -> bool {
        tokio::select! {
            item = self.0 .1.recv() => item.is_some(),
            _ = self.2.recv() => false,
        }
    }
}

struct Permits(Arc<Semaphore>, Arc<Semaphore>);

fn semaphores() -> (Permits, Permits) {
    let (a, b) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
    (Permits(a.clone(), b.clone()), Permits(b, a))
}

impl Side for Permits {
    async fn give(&mut self) {
        self.0.add_permits(1)
    }
    async fn take(&mut self) -> bool {
        self.1.acquire().await.expect("never closed").forget();
        true
    }
}

// A task and a oneshot: there is no partner.
struct Task(Option<oneshot::Receiver<()>>, Duration);

impl Side for Task {
    async fn give(&mut self) {
        let (done, wait) = oneshot::channel();
        let pause = self.1;
        tokio::spawn(async move {
            compute(pause);
            let _ = done.send(());
        });
        self.0 = Some(wait);
    }
    async fn take(&mut self) -> bool {
        self.0.take().expect("given").await.is_ok()
    }
}

// A task and its handle.
struct Joined(Option<tokio::task::JoinHandle<()>>, Duration);

impl Side for Joined {
    async fn give(&mut self) {
        let pause = self.1;
        self.0 = Some(tokio::spawn(async move { compute(pause) }));
    }
    async fn take(&mut self) -> bool {
        self.0.take().expect("given").await.is_ok()
    }
}

async fn rounds(side: &mut impl Side, n: usize, pause: Duration) {
    for _ in 0..n {
        compute(pause);
        side.give().await;
        assert!(side.take().await, "the other side has ended");
    }
}

// Microseconds of a round, of as many as fit; or, with pauses, the median without them.
async fn measure(mut side: impl Side, pause: Duration) -> f64 {
    if pause.is_zero() {
        rounds(&mut side, WARM, pause).await;
        let (began, mut n) = (Instant::now(), 0);
        while began.elapsed() < SPAN.mul_f64(scale()) {
            rounds(&mut side, 20, pause).await;
            n += 20;
        }
        return began.elapsed().as_secs_f64() * 1e6 / n as f64;
    }
    let mut took = Vec::new();
    rounds(&mut side, WARM / 10, pause).await;
    for _ in 0..((PAUSED as f64 * scale()) as usize).clamp(1, PAUSED) {
        let began = Instant::now();
        rounds(&mut side, 1, pause).await;
        took.push((began.elapsed().as_secs_f64() - 2.0 * pause.as_secs_f64()) * 1e6);
    }
    took.sort_by(f64::total_cmp);
    took[took.len() / 2]
}

// The partner answers until it is aborted. Both sides are tasks, so that both run on workers.
fn pair<S: Side>(runtime: &Runtime, sides: (S, S), pause: Duration) -> f64 {
    let (a, mut b) = sides;
    let partner = runtime.spawn(async move {
        while b.take().await {
            compute(pause);
            b.give().await;
        }
    });
    let each = alone(runtime, a, pause);
    partner.abort();
    each
}

fn alone(runtime: &Runtime, side: impl Side, pause: Duration) -> f64 {
    runtime.block_on(runtime.spawn(measure(side, pause))).expect("no panic")
}

fn hands(kind: &str, runtime: &Runtime, pause: Duration) {
    let figure = |name: &str, run: &dyn Fn() -> f64| {
        let figure = format!("hand_{kind}_{name}");
        if wants(&figure) {
            println!("{figure}\t{:.4}\tus", run());
        }
    };
    for _ in 0..RUNS {
        figure("channel", &|| pair(runtime, channels(), pause));
        figure("select", &|| pair(runtime, selects(), pause));
        figure("semaphore", &|| pair(runtime, semaphores(), pause));
        figure("go", &|| alone(runtime, Task(None, pause), pause));
        figure("go_wait", &|| alone(runtime, Joined(None, pause), pause));
    }
}

fn main() {
    let sections: Vec<String> = std::env::args().skip(1).collect();
    if !sections.is_empty() && !sections.iter().any(|s| s == "handover") {
        return;
    }
    let one = Builder::new_current_thread().build().expect("a runtime");
    let two = Builder::new_multi_thread()
        .worker_threads(2)
        .build()
        .expect("a runtime");
    hands("1", &one, Duration::ZERO);
    hands("2", &two, Duration::ZERO);
    hands("long", &two, PAUSE);
}
