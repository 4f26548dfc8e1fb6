//! Ctrl-C and SIGTERM: one signal stops cleanly, a second one at once.

use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::failure::Interrupted;
use crate::print;

/// A token that is cancelled by the first signal; the second ends the process with exit code 3, which loses nothing
/// acknowledged.
pub(crate) fn on_signal() -> std::io::Result<CancellationToken> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let stop = CancellationToken::new();
    let token = stop.clone();
    tokio::spawn(async move {
        let mut signals = 0;
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            signals += 1;
            if signals > 1 {
                std::process::exit(3);
            }
            print::note("stopping: finishing what is being computed (once more to stop at once)");
            token.cancel();
        }
    });
    Ok(stop)
}

/// What `work` gives, or [`Interrupted`] as soon as `stop` is cancelled. It runs on a thread of its own, which nobody waits
/// for then: a listing blocks, and a file system may hang.
pub(crate) async fn unless_stopped<T, W>(
    stop: &CancellationToken,
    work: impl FnOnce() -> W + Send + 'static,
) -> anyhow::Result<T>
where
    T: Send + 'static,
    W: Future<Output = anyhow::Result<T>>,
{
    let runtime = Handle::current();
    let working = tokio::task::spawn_blocking(move || runtime.block_on(work()));
    tokio::select! {
        worked = working => worked?,
        () = stop.cancelled() => Err(Interrupted.into()),
    }
}
