//! Ctrl-C and SIGTERM: one signal stops cleanly, a second one at once.

use tokio_util::sync::CancellationToken;

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
