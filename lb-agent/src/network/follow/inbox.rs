//! A queue of limited length between the netlink socket and the loop that follows the network.
//!
//! rtnetlink's own queue has no limit: a loop that falls behind would work on older and older
//! messages, in more and more memory, and the kernel would never report an overrun. What does not
//! fit here is dropped and counts as an overrun, after which everything is read again.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use futures::{Stream, StreamExt};
use tokio::{
    sync::mpsc::{Receiver, channel, error::TrySendError},
    task::JoinHandle,
};

/// What comes out of an [`Inbox`].
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Received<T> {
    Message(T),
    /// Messages were dropped.
    Overrun,
    /// The source has ended.
    Closed,
}

/// The receiving end; ends with its source, and its source with it.
#[derive(Debug)]
pub(super) struct Inbox<T> {
    messages: Receiver<T>,
    has_overrun: Arc<AtomicBool>,
    filling: JoinHandle<()>,
}

impl<T: Send + 'static> Inbox<T> {
    /// A queue of at most `capacity` messages of a source.
    pub(super) fn new(
        source: impl Stream<Item = T> + Send + Unpin + 'static,
        capacity: usize,
    ) -> Self {
        let (sender, messages) = channel(capacity);
        let has_overrun = Arc::new(AtomicBool::new(false));
        let overrun = Arc::clone(&has_overrun);
        let filling = tokio::spawn(async move {
            let mut source = source;
            while let Some(message) = source.next().await {
                match sender.try_send(message) {
                    Ok(()) => {}
                    Err(TrySendError::Full(_)) => overrun.store(true, Ordering::Relaxed),
                    Err(TrySendError::Closed(_)) => return,
                }
            }
        });
        Self { messages, has_overrun, filling }
    }

    /// The next message. An overrun comes before the messages that were queued then, which are
    /// dropped too: what is read after it is newer.
    pub(super) async fn next(&mut self) -> Received<T> {
        match self.messages.recv().await {
            Some(message) => self.checked(message),
            None => Received::Closed,
        }
    }

    /// The next message, if there is one already.
    pub(super) fn try_next(&mut self) -> Option<Received<T>> {
        self.messages.try_recv().ok().map(|message| self.checked(message))
    }

    fn checked(&mut self, message: T) -> Received<T> {
        if !self.has_overrun.swap(false, Ordering::Relaxed) {
            return Received::Message(message);
        }
        while self.messages.try_recv().is_ok() {}
        Received::Overrun
    }
}

impl<T> Drop for Inbox<T> {
    fn drop(&mut self) {
        self.filling.abort();
    }
}

#[cfg(test)]
mod tests {
    use futures::channel::mpsc;

    use super::*;

    #[tokio::test]
    async fn messages_that_do_not_fit_are_an_overrun() {
        let (sender, source) = mpsc::unbounded();
        let mut inbox = Inbox::new(source, 2);
        sender.unbounded_send(1).unwrap();
        assert_eq!(inbox.next().await, Received::Message(1));
        assert_eq!(inbox.try_next(), None);
        for number in 2..=9 {
            sender.unbounded_send(number).unwrap();
        }
        tokio::task::yield_now().await;
        assert_eq!(inbox.next().await, Received::Overrun);
        assert_eq!(inbox.try_next(), None, "what was queued is older than what is read next");
        sender.unbounded_send(10).unwrap();
        assert_eq!(inbox.next().await, Received::Message(10));
        drop(sender);
        assert_eq!(inbox.next().await, Received::Closed);
    }
}
