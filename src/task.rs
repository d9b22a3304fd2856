//! The one place where a task is spawned. A task has a name, and a panic in it is told.

use std::future::Future;

use futures_util::FutureExt;
use tokio::task::JoinHandle;

/// Most threads for what blocks, beside one for each CPU. Tokio's own number, said here because limits of the process are reckoned with it.
pub const BLOCKING_THREADS: usize = 512;

/// Spawns a task. It is never aborted: what is to stop early is told to, and answers.
#[expect(clippy::disallowed_methods, reason = "this is the one place")]
pub fn spawn<F>(name: &'static str, future: F) -> JoinHandle<()>
where
    F: Future<Output = ()> + Send + 'static,
{
    tokio::spawn(async move {
        if std::panic::AssertUnwindSafe(future).catch_unwind().await.is_err() {
            tracing::error!(task = name, "a task panicked");
        }
    })
}

/// Does what would hold up others: reads files. Nothing when it panicked.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    tokio::task::spawn_blocking(work).await.inspect_err(|error| tracing::error!(%error, "blocking work panicked")).ok()
}

/// Spawns what hyper needs in the background.
#[derive(Debug, Clone, Copy)]
pub struct Executor;

impl<F> hyper::rt::Executor<F> for Executor
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, future: F) {
        spawn("http2", future);
    }
}
