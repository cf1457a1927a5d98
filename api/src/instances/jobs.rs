//! Work on disks and images that goes on behind requests: one job at a time for each of them, its progress
//! written into its record, and its end when it is not wanted any more.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::error::Error;
use super::host::Host;
use crate::files::{Progress, Task};
use crate::records::Record;

/// Between two writes of a job's progress.
const NOTE_EVERY: Duration = Duration::from_millis(500);
/// For jobs to end when the daemon does.
const END_WITHIN: Duration = Duration::from_secs(5);

/// The jobs there are, by the id of what they work on. Clones are the same.
#[derive(Clone, Default)]
pub struct Jobs(Arc<Mutex<Running>>);

#[derive(Default)]
struct Running {
    closed: bool,
    jobs: HashMap<String, Job>,
}

struct Job {
    task: Task,
    handle: JoinHandle<()>,
}

/// What a job has to work with.
pub struct Work {
    pub task: Task,
    progress: watch::Receiver<Option<Progress>>,
}

impl Work {
    fn new() -> Self {
        let (sender, progress) = watch::channel(None);
        Work { task: Task::new(move |progress| _ = sender.send_replace(Some(progress))), progress }
    }

    /// Does `work`, with its progress written into record `id` by `note` meanwhile.
    pub async fn noted<R: Record, T>(
        &self,
        host: &Host,
        id: &str,
        note: impl Fn(&mut R, Progress),
        work: impl Future<Output = T>,
    ) -> T {
        let mut work = std::pin::pin!(work);
        let mut written = None;
        loop {
            tokio::select! {
                done = &mut work => return done,
                () = tokio::time::sleep(NOTE_EVERY) => {}
            }
            let now = *self.progress.borrow();
            if let Some(progress) = now.filter(|_| now != written) {
                written = now;
                let noted = host.records.modify(id, |record: &mut R| {
                    note(record, progress);
                    Ok::<_, Error>(())
                });
                if let Err(error) = noted.await {
                    tracing::warn!(id, "progress cannot be written down: {error}");
                }
            }
        }
    }

    /// Does what blocks in a thread of its own. Giving up the future gives up the work.
    pub async fn blocking<T: Send + 'static, E: Into<Error> + Send + 'static>(
        &self,
        work: impl FnOnce(&Task) -> Result<T, E> + Send + 'static,
    ) -> Result<T, Error> {
        let given_up = self.task.cancel_on_drop();
        let task = self.task.clone();
        let done = tokio::task::spawn_blocking(move || work(&task)).await;
        given_up.disarm();
        match done {
            // The daemon ends: the next one goes on from what the record says, not from here.
            Err(error) if error.is_cancelled() => std::future::pending().await,
            done => done?.map_err(Into::into),
        }
    }
}

impl Jobs {
    fn lock(&self) -> MutexGuard<'_, Running> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Works on `id`: `next` is asked what to do, again and again, until it says that there is nothing. Where
    /// somebody is at it already, that one asks again before it ends, so that nothing is missed.
    pub fn run<F: Future<Output = ()> + Send + 'static>(
        &self,
        id: &str,
        mut next: impl FnMut(Work) -> Option<F> + Send + 'static,
    ) {
        let mut running = self.lock();
        if running.closed || running.jobs.contains_key(id) {
            return;
        }
        let (jobs, own) = (self.clone(), id.to_owned());
        let handle = tokio::spawn(async move {
            loop {
                let step = {
                    let mut running = jobs.lock();
                    let work = Work::new();
                    let task = work.task.clone();
                    let step = if running.closed { None } else { next(work) };
                    match (step, running.jobs.get_mut(&own)) {
                        (Some(step), Some(job)) => {
                            job.task = task;
                            step
                        }
                        _ => {
                            running.jobs.remove(&own);
                            return;
                        }
                    }
                };
                step.await;
            }
        });
        running.jobs.insert(id.to_owned(), Job { task: Task::quiet(), handle });
    }

    /// Has what is being done for `id` given up, if anything is.
    pub fn cancel(&self, id: &str) {
        if let Some(job) = self.lock().jobs.get(id) {
            job.task.cancel();
        }
    }

    /// Gives up everything, and starts nothing any more.
    pub async fn end(&self) {
        let jobs: Vec<Job> = {
            let mut running = self.lock();
            running.closed = true;
            running.jobs.drain().map(|(_, job)| job).collect()
        };
        jobs.iter().for_each(|job| job.task.cancel());
        for mut job in jobs {
            if tokio::time::timeout(END_WITHIN, &mut job.handle).await.is_err() {
                job.handle.abort();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[tokio::test]
    async fn one_at_a_time_and_nothing_is_missed() {
        let (jobs, wanted, done) =
            (Jobs::default(), Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
        for _ in 0..100 {
            wanted.fetch_add(1, Ordering::SeqCst);
            let (wanted, done) = (wanted.clone(), done.clone());
            jobs.run("a", move |_| {
                let (due, done) = (wanted.load(Ordering::SeqCst), done.clone());
                (done.load(Ordering::SeqCst) < due).then_some(async move {
                    tokio::task::yield_now().await;
                    done.store(due, Ordering::SeqCst);
                })
            });
            tokio::task::yield_now().await;
        }
        while done.load(Ordering::SeqCst) < 100 {
            tokio::task::yield_now().await;
        }
        jobs.end().await;
        jobs.run("b", |_| -> Option<std::future::Ready<()>> { panic!("it is closed") });
    }

    #[tokio::test]
    async fn what_is_cancelled_is_given_up() {
        let jobs = Jobs::default();
        let mut once = true;
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let mut sender = Some(sender);
        jobs.run("a", move |work| {
            let sender = sender.take()?;
            std::mem::take(&mut once).then_some(async move {
                work.task.cancelled().await;
                _ = sender.send(());
            })
        });
        tokio::task::yield_now().await;
        jobs.cancel("a");
        receiver.await.unwrap();
    }
}
