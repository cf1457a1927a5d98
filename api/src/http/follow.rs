//! A console as it is written: the end of its log, and then what comes, for as long as the client listens.

use std::io::SeekFrom;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use tokio::fs::File;
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;

use super::Api;
use super::error::Refusal;

/// Between looks at the log.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// What is shown of before, in bytes.
const TAIL: u64 = 64 << 10;
/// Read at once, in bytes.
const PIECE: usize = 16 << 10;
/// Pieces a client may be behind before nothing more is read for it.
const BEHIND: usize = 8;

/// The body of an answer that goes on until the instance is no longer kept, the client goes, or the daemon ends.
///
/// # Errors
///
/// Too many such connections are open.
pub fn console(api: &Arc<Api>, id: String, log: PathBuf) -> Result<Body, Refusal> {
    let permit = api.long_lived()?;
    let (sender, receiver) = mpsc::channel(BEHIND);
    let api = api.clone();
    tokio::spawn(async move {
        let _permit = permit;
        let mut at = None;
        while api.instances.get(&id).is_ok() && !api.events.is_closed() {
            tokio::select! {
                () = sender.closed() => return,
                // What cannot be read now can be at the next look.
                piece = read(&log, &mut at) => match piece.unwrap_or_default() {
                    piece if piece.is_empty() => tokio::time::sleep(LOOK_EVERY).await,
                    piece => if sender.send(piece).await.is_err() {
                        return;
                    },
                },
            }
        }
    });
    Ok(Body::from_stream(ReceiverStream::new(receiver).map(Ok::<Bytes, std::io::Error>)))
}

/// The next piece from `at` on: from near the end at first, from the beginning if the log began anew.
async fn read(log: &Path, at: &mut Option<u64>) -> std::io::Result<Bytes> {
    let mut file = match File::open(log).await {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Bytes::new()),
        file => file?,
    };
    let length = file.metadata().await?.len();
    let from = match *at {
        None => length.saturating_sub(TAIL),
        Some(at) if at > length => 0,
        Some(at) => at,
    };
    file.seek(SeekFrom::Start(from)).await?;
    let mut piece = vec![0; PIECE];
    let count = file.read(&mut piece).await?;
    piece.truncate(count);
    *at = Some(from.saturating_add(count as u64));
    Ok(piece.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_log_is_followed_also_when_it_begins_anew() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("console");
        let mut at = None;
        assert!(read(&log, &mut at).await.unwrap().is_empty(), "there is none yet");
        std::fs::write(&log, "one").unwrap();
        assert_eq!(read(&log, &mut at).await.unwrap(), "one");
        assert!(read(&log, &mut at).await.unwrap().is_empty());
        std::fs::write(&log, "one, two").unwrap();
        assert_eq!(read(&log, &mut at).await.unwrap(), ", two");
        std::fs::write(&log, "new").unwrap();
        assert_eq!(read(&log, &mut at).await.unwrap(), "new");
    }
}
