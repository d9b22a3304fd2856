//! A line on a terminal's standard error that says what is being waited for, after a second of silence. Never on pipes.

use std::future::Future;
use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval_at};

const FRAMES: [char; 4] = ['|', '/', '-', '\\'];

/// Awaits a future and shows that it takes long.
pub async fn while_waiting<F: Future>(what: &str, future: F) -> F::Output {
    if !std::io::stderr().is_terminal() {
        return future.await;
    }
    let start = Instant::now();
    let mut ticks = interval_at(start + Duration::from_secs(1), Duration::from_millis(200));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut future = std::pin::pin!(future);
    let mut frame = 0;
    loop {
        tokio::select! {
            biased;
            output = &mut future => {
                if frame > 0 {
                    show("\r\x1b[K");
                }
                return output;
            }
            _ = ticks.tick() => {
                show(&format!("\r\x1b[K{} {what}, {} s", FRAMES[frame % FRAMES.len()], start.elapsed().as_secs()));
                frame += 1;
            }
        }
    }
}

/// Losing this line loses nothing.
fn show(text: &str) {
    let mut stderr = std::io::stderr();
    let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
}
