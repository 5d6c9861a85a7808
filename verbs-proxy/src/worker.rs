//! The worker thread: turns of the data plane, spinning while there is work, asleep when there is none.

mod spinner;

use crate::device::Device;
use crate::pacing::Nanos;
use crate::plane::bell::Bell;
use crate::plane::{Notice, Plane};
use crate::sandbox::{Slices, set_slices};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::thread::{sched_getaffinity, sched_getcpu, sched_setaffinity};
use rustix::time::{ClockId, Timespec, clock_gettime};
use spinner::{Pause, Spinner};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

/// Nanoseconds of the monotonic clock.
#[must_use]
pub fn now() -> Nanos {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec as Nanos * 1_000_000_000 + time.tv_nsec as Nanos
}

type Command<D> = Box<dyn FnOnce(&mut Plane<D>) + Send>;

/// A wake-up between threads of this process, that can be waited for with poll. Nobody else ever holds it.
fn signal() -> Result<OwnedFd, Errno> {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
}

/// A full counter is raised already.
fn raise(signal: impl AsFd) {
    let _ = rustix::io::write(&signal, &1u64.to_ne_bytes());
}

/// Takes a signal back. Never waits.
pub fn lower(signal: impl AsFd) {
    let _ = rustix::io::read(&signal, &mut [0; 8]);
}

#[derive(Debug)]
struct Signals {
    commands_waiting: AtomicBool,
    wake: OwnedFd,
    notices_waiting: OwnedFd,
}

/// The control thread's hold on the worker.
#[derive(Debug)]
pub struct Worker<D: Device> {
    commands: Sender<Command<D>>,
    signals: Arc<Signals>,
    /// What the worker says.
    pub notices: Receiver<Notice<D::Notice>>,
}

impl<D: Device + Send> Worker<D> {
    /// Starts the thread. `bell` is what the container's processes ring.
    pub fn start(mut plane: Plane<D>, bell: Bell, spin: Nanos) -> std::io::Result<Self> {
        let (commands, received) = channel();
        let (notice, notices) = channel();
        let signals =
            Arc::new(Signals { commands_waiting: AtomicBool::new(false), wake: signal()?, notices_waiting: signal()? });
        plane.clock = |_| now();
        let thread = Thread {
            plane,
            commands: received,
            notices: notice,
            signals: Arc::clone(&signals),
            bell: Some(bell),
            rung: false,
            slices: Slices::Short,
        };
        std::thread::Builder::new().name("worker".into()).stack_size(256 << 10).spawn(move || {
            // A sleep must not be prolonged by the default slack of 50 µs: pieces on the modelled link are shorter.
            let _ = rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1));
            set_slices(Slices::Short);
            thread.run(&mut Spinner::new(spin));
        })?;
        let worker = Self { commands, signals, notices };
        // Returns when the thread serves: what it asked of the kernel for itself is done, and may be forbidden afterwards.
        worker.call(|_| ());
        Ok(worker)
    }

    /// Runs `job` on the worker between two turns and waits for its answer.
    ///
    /// # Panics
    /// If the worker thread is gone, which only a bug can bring about.
    pub fn call<R: Send + 'static>(&self, job: impl FnOnce(&mut Plane<D>) -> R + Send + 'static) -> R {
        let (answer, answered) = channel();
        let command: Command<D> = Box::new(move |plane| {
            let _ = answer.send(job(plane));
        });
        self.commands.send(command).expect("the worker thread lives as long as the process");
        self.signals.commands_waiting.store(true, Ordering::Release);
        raise(&self.signals.wake);
        answered.recv().expect("the worker answers every command")
    }

    /// Readable when [`Self::notices`] has something.
    #[must_use]
    pub fn notices_fd(&self) -> &OwnedFd {
        &self.signals.notices_waiting
    }
}

struct Thread<D: Device> {
    plane: Plane<D>,
    commands: Receiver<Command<D>>,
    notices: Sender<Notice<D::Notice>>,
    signals: Arc<Signals>,
    /// What the container rings; none after it abused that.
    bell: Option<Bell>,
    /// There are rings to be taken from it.
    rung: bool,
    slices: Slices,
}

impl<D: Device> Thread<D> {
    fn run(mut self, spinner: &mut Spinner) {
        loop {
            let mut worked = false;
            if self.signals.commands_waiting.load(Ordering::Relaxed) {
                worked = true;
                self.obey();
            }
            if self.plane.needs_time() {
                self.plane.now = now();
            }
            worked |= self.plane.turn();
            // Also of a turn in which nothing moved: a queue may wait for what its notice asks for.
            if self.plane.has_notices() {
                self.report();
            }
            if worked {
                spinner.worked();
                continue;
            }
            let pause = spinner.idle(now);
            if pause != Pause::Spin && spinner.slices() != self.slices {
                self.slices = spinner.slices();
                set_slices(self.slices);
            }
            match pause {
                Pause::Spin => std::hint::spin_loop(),
                Pause::Yield => {
                    if spinner.yielded(now, rustix::thread::sched_yield) {
                        move_away();
                    }
                }
                Pause::Sleep => self.sleep(spinner),
            }
        }
    }

    fn obey(&mut self) {
        // Cleared first: a command sent after this sets it again.
        self.signals.commands_waiting.swap(false, Ordering::AcqRel);
        self.plane.now = now();
        while let Ok(command) = self.commands.try_recv() {
            command(&mut self.plane);
        }
    }

    fn report(&mut self) {
        let mut any = false;
        for notice in self.plane.take_notices() {
            any |= self.notices.send(notice).is_ok();
        }
        if any {
            raise(&self.signals.notices_waiting);
        }
    }

    fn sleep(&mut self, spinner: &mut Spinner) {
        self.plane.now = now();
        let wait = match self.plane.wake_at() {
            Some(at) if at <= self.plane.now + SHORTEST_SLEEP => return,
            Some(at) => Some(at - self.plane.now),
            None => None,
        };
        self.silence_bell();
        if self.plane.rest_all() && self.plane.prepare_sleep() {
            let timeout = wait
                .map(|wait| Timespec { tv_sec: (wait / 1_000_000_000) as i64, tv_nsec: (wait % 1_000_000_000) as _ });
            let mut fds = vec![PollFd::new(&self.signals.wake, PollFlags::IN)];
            fds.extend(self.bell.iter().map(|bell| PollFd::new(bell, PollFlags::IN)));
            let own = fds.len();
            fds.extend(self.plane.device.wakers().map(|waker| PollFd::from_borrowed_fd(waker, PollFlags::IN)));
            // An interrupted or failed poll is a wake-up like any other.
            let _ = poll(&mut fds, timeout.as_ref());
            let rung = |fd: &PollFd<'_>| !fd.revents().is_empty();
            if rung(&fds[0]) {
                lower(&self.signals.wake);
            }
            self.rung = fds[1..own].iter().any(rung);
            if fds[own..].iter().any(rung) {
                drop(fds);
                D::woken(&mut self.plane);
            }
        }
        self.plane.awake();
        let woken = now();
        spinner.slept(self.plane.now, woken);
        // The next turn may not ask for the time, and yet tell a request when to come again.
        self.plane.now = woken;
    }
}

impl<D: Device> Thread<D> {
    /// Takes the container's rings, of which it has heard. Not when it wakes, which is in the way of a request, but before it
    /// sleeps again: whoever has rung has set its queue's bit before, which is looked at after this and before the sleep.
    fn silence_bell(&mut self) {
        if std::mem::take(&mut self.rung)
            && let Some(bell) = &self.bell
            && bell.silence().is_err()
        {
            // Nothing but a hostile program does that, and its container may do without being heard while the worker sleeps.
            self.bell = None;
        }
    }
}

/// Leaves the present processor for another one, if there is one.
///
/// A worker that shares a processor with the application that it serves runs only while that does not: the kernel's balancing sees
/// no reason to part the two, or not for a long time, though another processor may be idle.
fn move_away() {
    let Ok(allowed) = sched_getaffinity(None) else { return };
    let mut others = allowed;
    others.unset(sched_getcpu());
    if others.count() > 0 && sched_setaffinity(None, &others).is_ok() {
        // The kernel has moved the thread; where it goes from there is the kernel's affair again.
        let _ = sched_setaffinity(None, &allowed);
    }
}

/// Below this, a sleep is over before it has begun.
const SHORTEST_SLEEP: Nanos = 3_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_raised_and_lowered() {
        let raised = |signal: &OwnedFd| {
            let mut fds = [PollFd::new(signal, PollFlags::IN)];
            poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) == Ok(1)
        };
        let signal = signal().unwrap();
        lower(&signal);
        raise(&signal);
        raise(&signal);
        assert!(raised(&signal));
        lower(&signal);
        assert!(!raised(&signal));
    }
}
