//! Descriptors: of every kind, in flight, and those that others hold.

use crate::kinds::{every, lingering as lingering_socket};
use crate::{Scene, descriptors, post_writes};
use anyhow::{Context, Result, ensure};
use ringfence_integration::command::wait_until;
use ringfence_integration::direct::DirectProxy;
use ringfence_integration::raw::{Objects, Raw, SCM_MAX_FDS, ring_bell};
use ringfence_integration::stalled::StalledPage;
use ringfence_protocol::control::{Hello, Op};
use ringfence_proxy::launch::Limits;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};
use zerocopy::IntoBytes;

/// A proxy ends at once with its container; a busy machine may take its time.
const END: Duration = Duration::from_secs(10);

/// What the proxy has answered and nobody has received, with the descriptors in it, which the kernel counts.
pub fn unread_answers(scene: &mut Scene) -> Result<()> {
    let hello = Hello { version: ringfence_protocol::VERSION, reserved: 0 };
    let hello = Raw::request(Op::HELLO, 1, hello.as_bytes());
    let open = Raw::request(Op::OPEN, 2, &[0; 8]);
    let mut clients = Vec::new();
    for _ in 0..50 {
        let raw = Raw::connect(&scene.socket())?;
        raw.send(&hello, &[], SendFlags::empty())?;
        for _ in 0..30 {
            raw.send(&open, &[], SendFlags::empty())?;
        }
        clients.push(raw);
    }
    // Long enough for a proxy that answers all of them.
    std::thread::sleep(Duration::from_millis(500));
    for raw in &clients {
        let unread = raw.unread_descriptors()?;
        ensure!(unread <= 4, "{unread} descriptors lie unread on one connection");
    }
    scene.works().context("while answers lie unread")?;
    // Whoever takes them gets them all.
    for raw in &clients {
        for _ in 0..31 {
            ensure!(raw.receive()?.is_some_and(|(_, fds)| !fds.is_empty()), "an answer is missing");
        }
    }
    drop(clients);
    // Connections that the proxy ends while their answers lie unread.
    let mut ended = Vec::new();
    for _ in 0..1500 {
        let Ok(raw) = Raw::connect(&scene.socket()) else { break };
        raw.send(&hello, &[], SendFlags::empty()).ok();
        raw.send(&[0; 16], &[], SendFlags::empty()).ok();
        ended.push(raw);
    }
    ensure!(ended.len() > 1200, "only {} connections", ended.len());
    std::thread::sleep(Duration::from_millis(500));
    let unread = ended.iter().map(Raw::unread_descriptors).sum::<Result<usize>>()?;
    ensure!(unread <= 2 * 1024, "{unread} descriptors lie unread on connections that have ended");
    drop(ended);
    wait_until("the proxy to serve again", Duration::from_secs(5), || Raw::greet(&scene.socket()).is_ok())
}

/// Descriptors whose last close waits for a minute.
pub fn lingering(scene: &mut Scene) -> Result<()> {
    let mut proxy = scene.node.proxy(Limits::default())?;
    // Kernels refuse them since Linux 6.16. Dropped after their peers, when nothing waits any more.
    let mut refused = Vec::new();
    let mut peers = Vec::new();
    for round in 0..20 {
        let (socket, peer) = lingering_socket(60)?;
        peers.push(peer);
        let raw = Raw::connect(&proxy.socket())?;
        let hello = Raw::request(Op::HELLO, 1, Hello { version: ringfence_protocol::VERSION, reserved: 0 }.as_bytes());
        if round % 2 == 0 {
            // Behind an answer that nobody reads.
            raw.send(&hello, &[], SendFlags::empty())?;
        }
        match raw.send(&hello, &[socket.as_fd()], SendFlags::empty()) {
            // Whoever closes it last waits; that must not be this test.
            Ok(()) => drop(std::thread::spawn(move || drop(socket))),
            Err(_) => refused.push(socket),
        }
    }
    let start = Instant::now();
    Raw::greet(&proxy.socket()).context("after descriptors that linger")?;
    ensure!(start.elapsed() < END, "an answer took {:?}", start.elapsed());
    proxy.end_init()?;
    wait_until("the proxy to end with its container", END, || proxy.has_ended())
}

pub fn every_kind(scene: &mut Scene) -> Result<()> {
    let mut proxy = scene.node.proxy(Limits::default())?;
    let (kinds, beside) = every()?;
    for (name, fd) in &kinds {
        for op in 0..32 {
            let (raw, _fds) = Raw::greet(&proxy.socket()).with_context(|| format!("before op {op} with {name}"))?;
            match raw.send(&Raw::request(Op(op), 2, &[0; 16]), &[fd.as_fd()], SendFlags::empty()) {
                Ok(()) => ensure!(matches!(raw.receive(), Ok(None)), "op {op} was answered in spite of {name}"),
                // Refused by the kernel: since Linux 6.16 all, since 6.7 those of io_uring.
                Err(rustix::io::Errno::PERM | rustix::io::Errno::INVAL) => {}
                Err(error) => anyhow::bail!("sending {name}: {error}"),
            }
        }
    }
    // First, so that ours does not linger.
    drop(beside);
    drop(kinds);
    Raw::greet(&proxy.socket())?;
    proxy.end_init()?;
    wait_until("the proxy to end with its container", END, || proxy.has_ended())
}

/// Everything that the holder of one end of a pair of sockets can do to the other, which wakes the worker: descriptors that
/// linger, as many as there is room for; a hang-up of every kind.
pub fn abused_bell(scene: &mut Scene) -> Result<()> {
    let mut proxy = scene.node.proxy(Limits::default())?;
    let bell = |proxy: &DirectProxy| -> Result<OwnedFd> {
        let (_raw, fds) = Raw::greet(&proxy.socket())?;
        fds.into_iter().nth(1).context("HELLO brings the bell second")
    };
    let end = bell(&proxy)?;
    // Its flags are the proxy's, too: nothing may rely on them.
    rustix::fs::fcntl_setfl(&end, rustix::fs::OFlags::empty())?;
    let (socket, _peer) = lingering_socket(60)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SCM_MAX_FDS))];
    let mut sent = 0;
    for _ in 0..64 {
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [socket.as_fd(); SCM_MAX_FDS];
        control.push(SendAncillaryMessage::ScmRights(&fds));
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        sent += usize::from(sendmsg(&end, &[IoSlice::new(&[1])], &mut control, flags).is_ok());
        std::thread::sleep(Duration::from_millis(2));
    }
    // Whoever closes it last waits; that must not be this test.
    std::thread::spawn(move || drop(socket));
    let start = Instant::now();
    Objects::make(&proxy.socket()).context("after descriptors on the bell")?;
    ensure!(start.elapsed() < END, "answers took {:?}", start.elapsed());
    ensure!(descriptors(proxy.pid())? < 700, "the proxy has taken {} descriptors", descriptors(proxy.pid())?);
    if sent == 0 {
        // Linux 6.16: nothing got through, and the bell is as it was.
        ring_bell(&bell(&proxy)?)?;
    }
    proxy.end_init()?;
    wait_until("the proxy to end with its container", END, || proxy.has_ended())?;

    let proxy = scene.node.proxy(Limits::default())?;
    let end = bell(&proxy)?;
    ring_bell(&end)?;
    rustix::net::shutdown(&end, rustix::net::Shutdown::Both)?;
    rustix::net::connect_unspec(&end)?;
    drop(end);
    // A worker that never slept again would use all of a processor.
    std::thread::sleep(Duration::from_millis(300));
    let before = proxy.processor_ticks()?;
    std::thread::sleep(Duration::from_secs(1));
    let used = proxy.processor_ticks()? - before;
    ensure!(used <= 30, "an idle proxy used {used} ticks of 10 ms in 1 s");
    Objects::make(&proxy.socket()).map(drop).context("after a hang-up of the bell")
}

/// Takes an event into memory whose page fault nobody answers, while the next is due.
pub fn stalled_reader(scene: &mut Scene) -> Result<()> {
    let (objects, channel) = Objects::with_channel(&scene.socket())?;
    let page = StalledPage::new()?;
    let reader = page.read_into(channel.try_clone()?)?;
    // `CqHeader::armed`, in the second cache line.
    let arm = || objects.cq.write_all_at(&1u32.to_le_bytes(), 64);
    for number in 0..10 {
        arm()?;
        post_writes(&objects, number, 1)?;
        // Whether the queue got it shows in its ring; the worker may be held up by the event after it.
        std::thread::sleep(Duration::from_millis(20));
    }
    scene.works().context("while a reader of events stalls")?;
    page.answer();
    reader.join().ok();
    Ok(())
}
