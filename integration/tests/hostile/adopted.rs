//! Memory files of the container's own, which it hands over and keeps.

use crate::kinds::every;
use crate::unanswering::Unanswering;
use crate::{Scene, descriptors, domain};
use anyhow::{Context, Result, ensure};
use ringfence_integration::command::wait_until;
use ringfence_integration::raw::Raw;
use ringfence_protocol::control::{Handle, MrReply, Op, RegMr, ReplyHeader, Segment};
use ringfence_protocol::verbs::Access;
use ringfence_proxy::launch::Limits;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::net::SendFlags;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};
use zerocopy::{FromBytes, IntoBytes};

/// Hands a descriptor over: the region, or the errno of the refusal.
fn adopt(raw: &Raw, context: u32, fd: impl AsFd) -> Result<Result<Handle, u32>> {
    let body = Handle { handle: context, reserved: 0 };
    raw.send(&Raw::request(Op::ADOPT_REGION, 1, body.as_bytes()), &[fd.as_fd()], SendFlags::empty())?;
    let (bytes, fds) = raw.receive()?.context("the proxy closed the connection")?;
    ensure!(fds.is_empty(), "{} descriptors came back", fds.len());
    let (header, rest) = ReplyHeader::read_from_prefix(&bytes).map_err(|_| anyhow::anyhow!("a short reply"))?;
    if header.errno != 0 {
        return Ok(Err(header.errno));
    }
    Ok(Ok(Handle::read_from_bytes(rest).map_err(|_| anyhow::anyhow!("a body of {} bytes", rest.len()))?))
}

fn memory(bytes: u64) -> Result<OwnedFd> {
    let fd = memfd_create("hostile", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&fd, bytes)?;
    Ok(fd)
}

fn register(raw: &mut Raw, pd: u32, region: u32, offset: u64, length: u64) -> Result<MrReply> {
    let access = Access::LOCAL_WRITE | Access::REMOTE_WRITE | Access::REMOTE_READ;
    let request = RegMr { pd, access, length, segments: 1, ..RegMr::default() };
    let segment = Segment { region, reserved: 0, offset, length };
    Ok(raw.call(Op::REG_MR, &[request.as_bytes(), segment.as_bytes()].concat())?.0)
}

/// Everything that is no memory file is refused, at once, and closed.
pub fn every_kind(scene: &mut Scene) -> Result<()> {
    let mut proxy = scene.node.proxy(Limits::default())?;
    let (mut kinds, beside) = every()?;
    let unanswering = Unanswering::new()?;
    match &unanswering {
        Some(file) => kinds.push(("a file whose file system does not answer", file.fd()?)),
        None => eprintln!("left out: no FUSE on this machine"),
    }
    let start = Instant::now();
    for (name, fd) in &kinds {
        let (mut raw, _fds) = Raw::greet(&proxy.socket()).with_context(|| format!("before {name}"))?;
        let (open, _): (ringfence_protocol::control::OpenReply, _) = raw.call(Op::OPEN, &[0; 8])?;
        let is_memory = name.starts_with("a memory file");
        match adopt(&raw, open.context, fd) {
            Ok(Ok(_)) => ensure!(is_memory, "{name} was taken for memory"),
            Ok(Err(errno)) => ensure!(!is_memory, "{name} was refused with errno {errno}"),
            // What the kernel does not pass on.
            Err(error) if error.downcast_ref::<rustix::io::Errno>().is_some() => {}
            Err(error) => return Err(error.context(format!("after {name}"))),
        }
        // For a context that is not there it is closed as well.
        let _ = adopt(&raw, 99, fd);
    }
    ensure!(start.elapsed() < Duration::from_secs(20), "{} kinds took {:?}", kinds.len(), start.elapsed());
    // Though some of what it was sent cannot be closed.
    Raw::greet(&proxy.socket())?;
    proxy.end_init()?;
    // Who serves a container's files ends with it; what we hold ourselves must not linger.
    drop(unanswering);
    drop(beside);
    drop(kinds);
    wait_until("the proxy to end with its container", Duration::from_secs(10), || proxy.has_ended())
}

/// The same file a thousand times, and then as many as there may be.
pub fn without_end(scene: &mut Scene) -> Result<()> {
    let (mut raw, context, pd) = domain(scene)?;
    let before = descriptors(scene.attacked.pid())?;
    let file = memory(4096)?;
    let mut handles = 0u64;
    // Each of its names counts, and takes next to nothing.
    while let Ok(region) = adopt(&raw, context, &file)? {
        handles += 1;
        ensure!(handles <= 1 << 20, "{handles} names are no limit");
        if handles < 20 {
            register(&mut raw, pd, region.handle, 0, 4096)?;
        }
    }
    wait_until("what came more than once to be closed", Duration::from_secs(10), || {
        descriptors(scene.attacked.pid()).is_ok_and(|now| now <= before + 2)
    })?;
    drop(raw);
    let (raw, context, _) = domain(scene)?;
    let mut files = 0;
    while adopt(&raw, context, memory(4096)?)?.is_ok() {
        files += 1;
        ensure!(files <= 1 << 16, "{files} files are no limit");
    }
    ensure!(Raw::greet(&scene.socket()).is_ok(), "no room for another process beside {files} files");
    Ok(())
}

/// What does not fit the file, or changes under the hand.
pub fn of_other_sizes(scene: &mut Scene) -> Result<()> {
    let (mut raw, context, pd) = domain(scene)?;
    let file = memory(1 << 20)?;
    let region = adopt(&raw, context, &file)?.map_err(|errno| anyhow::anyhow!("errno {errno}"))?.handle;
    for (offset, length) in [(1 << 20, 4096), (0, (1 << 20) + 4096), (u64::MAX - 4095, 4096), (1 << 62, 4096)] {
        ensure!(register(&mut raw, pd, region, offset, length).is_err(), "{length} bytes at {offset} were registered");
    }
    let whole = register(&mut raw, pd, region, 0, 1 << 20)?;
    // Nothing that the container does to its file afterwards is the proxy's affair.
    ftruncate(&file, 0)?;
    ensure!(register(&mut raw, pd, region, 0, 4096).is_err(), "nothing was registered");
    ftruncate(&file, 1 << 40)?;
    // More than the quota, of a file of which nothing is there.
    ensure!(register(&mut raw, pd, region, 0, 1 << 40).is_err(), "a terabyte was registered");
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    raw.call::<[u8; 0]>(Op::DEREG_MR, Handle { handle: whole.handle, reserved: 0 }.as_bytes())?;
    let sealed = memory(4096)?;
    fcntl_add_seals(&sealed, SealFlags::WRITE)?;
    if let Ok(region) = adopt(&raw, context, &sealed)? {
        ensure!(register(&mut raw, pd, region.handle, 0, 4096).is_err(), "a file that is sealed was registered");
    }
    Ok(())
}
