//! Ctrl-C and SIGTERM: the first signal stops cleanly, the second one immediately.

use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::failure::Interrupted;
use crate::print;

/// A token that is cancelled by the first signal; the second ends the process with exit code 3. Acknowledged results are
/// never lost.
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
            print::note("stopping: finishing the current computation (once more to stop immediately)");
            token.cancel();
        }
    });
    Ok(stop)
}

/// Returns the result of `work`, or [`Interrupted`] as soon as `stop` is cancelled. `work` runs on its own thread, which is
/// abandoned when `stop` is cancelled, because a listing blocks and a file system may hang.
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
