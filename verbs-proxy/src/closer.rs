//! Closing descriptors that somebody else made.
//!
//! The last close of a descriptor may wait: a TCP socket lingers as long as its maker said, a file system that a program
//! serves waits for that program. So what containers and neighbours send is closed on a thread of its own, where nobody
//! waits for it. The same goes for the sockets that they may send on: messages that were never read hold descriptors.
//!
//! A proxy has one [`Closer`] for its container and another for its neighbours, so that neither holds the other up; and one for
//! memory of the container's that neighbours can write to.
//!
//! Whatever else may have to wait for somebody when it ends goes the same way: see [`Closer::finish`].

use rustix::fd::OwnedFd;
use std::fmt::Debug;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Closes descriptors, in order, on a thread of its own.
#[derive(Clone, Debug)]
pub struct Closer {
    queue: Arc<Queue>,
    limit: usize,
}

#[derive(Debug, Default)]
struct Queue {
    state: Mutex<State>,
    filled: Condvar,
    emptied: Condvar,
}

#[derive(Debug, Default)]
struct State {
    waiting: Vec<Item>,
    /// Taken out by the thread, and not all of them closed yet.
    closing: usize,
    /// Since when the thread has been at the same one.
    since: Option<Instant>,
    /// Somebody waited in vain, and nothing has been closed since.
    stuck: bool,
}

#[derive(Debug)]
enum Item {
    Descriptor(#[expect(dead_code, reason = "only to be dropped")] OwnedFd),
    Other(#[expect(dead_code, reason = "only to be dropped")] Box<dyn Debug + Send>),
}

impl Queue {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing that holds the lock can panic halfway through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Closer {
    /// Starts the thread. `limit`: how many descriptors may wait before [`Self::is_full`] says so.
    pub fn start(name: &str, limit: usize) -> io::Result<Self> {
        let queue = Arc::new(Queue::default());
        let served = Arc::clone(&queue);
        let (begins, begun) = std::sync::mpsc::channel();
        std::thread::Builder::new().name(name.into()).stack_size(64 << 10).spawn(move || {
            let _ = begins.send(());
            serve(&served);
        })?;
        // When the thread runs, what it asked of the kernel for itself is done, and may be forbidden afterwards.
        begun.recv().map_err(io::Error::other)?;
        Ok(Self { queue, limit })
    }

    /// Has a descriptor closed. Never waits for it.
    pub fn close(&self, fd: OwnedFd) {
        self.close_all([fd]);
    }

    /// Has descriptors closed. Never waits for them.
    pub fn close_all(&self, fds: impl IntoIterator<Item = OwnedFd>) {
        self.add(fds.into_iter().map(Item::Descriptor));
    }

    /// Has something dropped. Never waits for it.
    pub fn finish(&self, thing: impl Debug + Send + 'static) {
        self.add([Item::Other(Box::new(thing))]);
    }

    fn add(&self, items: impl IntoIterator<Item = Item>) {
        let mut state = self.queue.state();
        state.waiting.extend(items);
        let any = !state.waiting.is_empty();
        drop(state);
        if any {
            self.queue.filled.notify_one();
        }
    }

    /// Waits until nothing waits any more, but no longer than `limit`, and not again after that was in vain until something
    /// has moved. False if there was nothing to wait for, or too much.
    #[must_use]
    pub fn settle(&self, limit: Duration) -> bool {
        let mut state = self.queue.state();
        if state.stuck || state.waiting.len() + state.closing == 0 {
            return false;
        }
        let busy = |state: &mut State| state.waiting.len() + state.closing > 0;
        let (waited, timeout) =
            self.queue.emptied.wait_timeout_while(state, limit, busy).unwrap_or_else(PoisonError::into_inner);
        state = waited;
        state.stuck = timeout.timed_out();
        !state.stuck
    }

    /// Whether the thread has been at the same one for so long.
    #[must_use]
    pub fn is_held_up(&self, for_so_long: Duration) -> bool {
        self.queue.state().since.is_some_and(|since| since.elapsed() >= for_so_long)
    }

    /// Descriptors that are not closed yet.
    #[must_use]
    pub fn waiting(&self) -> usize {
        let state = self.queue.state();
        state.waiting.len() + state.closing
    }

    /// So many wait that nothing more may be taken in from whoever sent them. What is taken in nevertheless is closed in
    /// its turn like the rest.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.waiting() >= self.limit
    }
}

fn serve(queue: &Queue) {
    loop {
        let mut state = queue.state();
        while state.waiting.is_empty() {
            state = queue.filled.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let batch = std::mem::take(&mut state.waiting);
        state.closing = batch.len();
        state.since = Some(Instant::now());
        drop(state);
        for item in batch {
            drop(item);
            let mut state = queue.state();
            state.closing -= 1;
            state.stuck = false;
            state.since = (state.closing > 0).then(Instant::now);
        }
        queue.emptied.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::sockopt::set_socket_linger;
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};

    /// A connection with unsent data whose last close waits for `seconds`, and its other end.
    fn lingering(seconds: u64) -> (OwnedFd, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (peer, _) = listener.accept().unwrap();
        stream.set_nonblocking(true).unwrap();
        while (&stream).write(&[0; 65536]).is_ok() {}
        stream.set_nonblocking(false).unwrap();
        set_socket_linger(&stream, Some(Duration::from_secs(seconds))).unwrap();
        (stream.into(), peer)
    }

    fn wait_for(what: &str, done: impl Fn() -> bool) {
        let start = Instant::now();
        while !done() {
            assert!(start.elapsed() < Duration::from_secs(10), "{what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_descriptor_that_lingers_holds_up_nobody_but_those_behind_it() {
        let (closer, other) = (Closer::start("a", 3).unwrap(), Closer::start("b", 3).unwrap());
        let (fd, peer) = lingering(3600);
        let start = Instant::now();
        closer.close(fd);
        let (read, write) = rustix::pipe::pipe().unwrap();
        closer.close_all([write]);
        assert!(start.elapsed() < Duration::from_secs(5));
        assert!(!closer.is_full() && !closer.is_held_up(Duration::from_secs(3600)));
        wait_for("the closer is held up", || closer.is_held_up(Duration::from_millis(20)));
        closer.close(rustix::io::dup(&read).unwrap());
        assert!(closer.is_full());
        other.close(read);
        wait_for("the other closer closes", || other.waiting() == 0);
        assert!(!closer.settle(Duration::from_millis(1)));
        // In vain once: nobody waits again.
        let start = Instant::now();
        assert!(!closer.settle(Duration::from_secs(3600)));
        assert!(start.elapsed() < Duration::from_secs(5));
        // With its peer gone the connection is reset, and the close comes back.
        drop(peer);
        wait_for("the queue is closed to its end", || closer.waiting() == 0);
        assert!(!closer.is_held_up(Duration::ZERO));
    }

    #[test]
    fn who_settles_waits_for_what_takes_its_time() {
        #[derive(Debug)]
        struct Slow;
        impl Drop for Slow {
            fn drop(&mut self) {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        let closer = Closer::start("a", 3).unwrap();
        closer.finish(Slow);
        assert!(closer.settle(Duration::from_secs(60)));
        assert_eq!(closer.waiting(), 0);
        assert!(!closer.settle(Duration::from_secs(60)), "there is nothing to wait for");
    }
}
