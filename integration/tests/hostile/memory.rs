//! Memory beyond what the policy allows.

use crate::{Scene, descriptors, domain};
use anyhow::{Context, Result, ensure};
use ringfence_integration::command::wait_until;
use ringfence_integration::raw::Raw;
use ringfence_integration::stalled::StalledPage;
use ringfence_protocol::control::{
    AllocRegion, CqReply, CreateCq, FreshReply, Handle, MrReply, NO_HANDLE, Op, RegFresh, RegMr, ResizeCq, Segment,
};
use ringfence_protocol::verbs::Access;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::Duration;
use zerocopy::IntoBytes;

/// Page tables for many pages, charged as one byte.
pub fn oversized_regions(scene: &mut Scene) -> Result<()> {
    const BYTES: u64 = 64 << 20;
    let (mut raw, context, pd) = domain(scene)?;
    let (region, _): (Handle, _) =
        raw.call(Op::ALLOC_REGION, AllocRegion { context, reserved: 0, bytes: BYTES }.as_bytes())?;
    let whole = Segment { region: region.handle, reserved: 0, offset: 0, length: BYTES };
    for length in [1, 4096, BYTES - 4096] {
        let register = RegMr { pd, access: Access::LOCAL_WRITE, length, segments: 1, ..RegMr::default() };
        let answer = raw.call::<MrReply>(Op::REG_MR, &[register.as_bytes(), whole.as_bytes()].concat());
        ensure!(answer.is_err(), "{length} bytes were registered with {BYTES} bytes of pages");
    }
    Ok(())
}

/// Files of one page, some of them freed while a region keeps them.
pub fn many_regions(scene: &mut Scene) -> Result<()> {
    let before = descriptors(scene.attacked.pid())?;
    let (mut raw, context, pd) = domain(scene)?;
    let mut files = 0;
    loop {
        let alloc = AllocRegion { context, reserved: 0, bytes: 4096 };
        let Ok((region, _)) = raw.call::<Handle>(Op::ALLOC_REGION, alloc.as_bytes()) else { break };
        files += 1;
        ensure!(files <= 1 << 16, "{files} files are no limit");
        let register = RegMr { pd, access: Access::LOCAL_WRITE, length: 4096, segments: 1, ..RegMr::default() };
        let segment = Segment { region: region.handle, reserved: 0, offset: 0, length: 4096 };
        if raw.call::<MrReply>(Op::REG_MR, &[register.as_bytes(), segment.as_bytes()].concat()).is_ok() {
            raw.call::<[u8; 0]>(Op::FREE_REGION, region.as_bytes())?;
        }
    }
    let now = descriptors(scene.attacked.pid())?;
    ensure!(now <= before + files + 8, "{files} files, but {before} descriptors before and {now} now");
    ensure!(Raw::greet(&scene.socket()).is_ok(), "no room for another process beside {files} files");
    Ok(())
}

/// Files that are given out in advance: one at most, for nothing but what they are for, and charged when they are used.
pub fn files_ahead(scene: &mut Scene) -> Result<()> {
    let (mut raw, context, pd) = domain(scene)?;
    let (access, bytes) = (Access::LOCAL_WRITE, 4096);
    let new = RegFresh { context, pd, bytes, length: bytes, access, file: NO_HANDLE, ..RegFresh::default() };
    let ask = |raw: &mut Raw, request: RegFresh| raw.call::<FreshReply>(Op::REG_FRESH, request.as_bytes());
    let (first, fds) = ask(&mut raw, new)?;
    ensure!(first.ahead != NO_HANDLE && fds.len() == 2, "{first:?} with {} descriptors", fds.len());
    for round in 0..100 {
        let (reply, fds) = ask(&mut raw, new)?;
        ensure!(reply.ahead == NO_HANDLE && fds.len() == 1, "round {round}: {reply:?}, {} descriptors", fds.len());
    }
    let ahead = RegFresh { file: first.ahead, ..new };
    let register = RegMr { pd, access, length: bytes, segments: 1, ..RegMr::default() };
    let segment = Segment { region: first.ahead, reserved: 0, offset: 0, length: bytes };
    let registered = raw.call::<MrReply>(Op::REG_MR, &[register.as_bytes(), segment.as_bytes()].concat());
    ensure!(registered.is_err(), "a file that was given in advance was registered without being charged");
    for wrong in [
        RegFresh { bytes: 8192, length: 8192, ..ahead },
        RegFresh { access: Access(0), ..ahead },
        RegFresh { file: first.region, ..ahead },
        RegFresh { file: first.ahead ^ 1 << 20, ..ahead },
        RegFresh { context: context ^ 1 << 20, ..ahead },
    ] {
        ensure!(ask(&mut raw, wrong).is_err(), "{wrong:?} was registered");
    }
    let (second, fds) = ask(&mut raw, ahead)?;
    ensure!(second.region == first.ahead && fds.len() == 1, "{second:?} with {} descriptors", fds.len());
    ensure!(ask(&mut raw, ahead).is_err(), "it was used twice");
    let free = |raw: &mut Raw, handle| raw.call::<[u8; 0]>(Op::FREE_REGION, Handle { handle, reserved: 0 }.as_bytes());
    free(&mut raw, second.ahead)?;
    let (third, _) = ask(&mut raw, new)?;
    let (mut file, mut files) = (third.ahead, 0);
    while let Ok((reply, _)) = ask(&mut raw, RegFresh { file, ..new }) {
        ensure!(reply.ahead != NO_HANDLE, "none after {files}");
        (file, files) = (reply.ahead, files + 1);
        ensure!(files <= 1 << 16, "{files} files are no limit");
    }
    // What is refused can be given back, and the others, too.
    free(&mut raw, file)?;
    free(&mut raw, third.region).map(drop)
}

fn region(raw: &mut Raw, context: u32, bytes: u64) -> Result<(Handle, File)> {
    let (region, fds) = raw.call::<Handle>(Op::ALLOC_REGION, AllocRegion { context, reserved: 0, bytes }.as_bytes())?;
    Ok((region, only(fds)?))
}

fn only(fds: Vec<OwnedFd>) -> Result<File> {
    fds.into_iter().next().map(File::from).context("no descriptor")
}

/// Bytes that files take.
fn held(files: &[File]) -> Result<u64> {
    files.iter().try_fold(0, |sum, file| Ok(sum + file.metadata()?.blocks() * 512))
}

/// Regions of half the quota, registered and freed in turn, and their files kept.
pub fn kept_regions(scene: &mut Scene) -> Result<()> {
    const BYTES: u64 = 128 << 20;
    let (mut raw, context, pd) = domain(scene)?;
    let mut kept = Vec::new();
    for round in 0..6 {
        let (region, file) = region(&mut raw, context, BYTES).with_context(|| format!("round {round}"))?;
        let register = RegMr { pd, access: Access::LOCAL_WRITE, length: BYTES, segments: 1, ..RegMr::default() };
        let segment = Segment { region: region.handle, reserved: 0, offset: 0, length: BYTES };
        let (mr, _): (MrReply, _) = raw.call(Op::REG_MR, &[register.as_bytes(), segment.as_bytes()].concat())?;
        ensure!(file.metadata()?.blocks() == 0, "pages that the container did not touch were made in its stead");
        for at in (0..BYTES).step_by(1 << 20) {
            file.write_all_at(&[1; 1 << 20], at)?;
        }
        raw.call::<[u8; 0]>(Op::DEREG_MR, Handle { handle: mr.handle, reserved: 0 }.as_bytes())?;
        raw.call::<[u8; 0]>(Op::FREE_REGION, region.as_bytes())?;
        kept.push(file);
        ensure!(held(&kept)? <= 2 * BYTES, "{} bytes are held of a quota of {}", held(&kept)?, 2 * BYTES);
    }
    wait_until("files that were freed to be emptied", Duration::from_secs(10), || {
        held(&kept).is_ok_and(|held| held == 0)
    })
}

/// Completion queues destroyed, or resized again and again, and their files kept.
pub fn kept_queues(scene: &mut Scene) -> Result<()> {
    const QUOTA: u64 = 64 << 20;
    let (mut raw, context, _) = domain(scene)?;
    let create = CreateCq { context, cqe: 1 << 17, channel: NO_HANDLE, ..CreateCq::default() };
    let mut kept = Vec::new();
    let fill = |file: &File| -> Result<()> {
        for at in (0..file.metadata()?.len()).step_by(4096) {
            file.write_all_at(&[0xff; 8], at + 4088)?;
        }
        Ok(())
    };
    for _ in 0..12 {
        let (cq, fds): (CqReply, _) = raw.call(Op::CREATE_CQ, create.as_bytes())?;
        let file = only(fds)?;
        fill(&file)?;
        raw.call::<[u8; 0]>(Op::DESTROY_CQ, Handle { handle: cq.handle, reserved: 0 }.as_bytes())?;
        kept.push(file);
    }
    wait_until("files of destroyed queues to be emptied", Duration::from_secs(10), || {
        held(&kept).is_ok_and(|held| held == 0)
    })?;
    // Nothing is ever polled, so no ring may be emptied: then there must be an end to it.
    let (cq, fds): (CqReply, _) = raw.call(Op::CREATE_CQ, create.as_bytes())?;
    kept.push(only(fds)?);
    let resize = ResizeCq { handle: cq.handle, cqe: 1 << 17 };
    for _ in 0..20 {
        let Ok((_, fds)) = raw.call::<CqReply>(Op::RESIZE_CQ, resize.as_bytes()) else { break };
        kept.push(only(fds)?);
    }
    kept.iter().try_for_each(fill)?;
    let rings = kept.len() as u64 - 12;
    ensure!(rings * (8 << 20) <= QUOTA, "{rings} rings of 8 MiB were made of a quota of {QUOTA} bytes");
    raw.call::<[u8; 0]>(Op::DESTROY_CQ, Handle { handle: cq.handle, reserved: 0 }.as_bytes())?;
    wait_until("all rings of a resized queue to be emptied", Duration::from_secs(10), || {
        held(&kept[12..]).is_ok_and(|held| held == 0)
    })
}

/// A write into the file from memory whose page fault nobody answers holds the lock that emptying it takes.
pub fn locked_region(scene: &mut Scene) -> Result<()> {
    let (mut raw, context, _) = domain(scene)?;
    let (region, file) = region(&mut raw, context, 1 << 20)?;
    let page = StalledPage::new()?;
    let writer = page.write_from(file)?;
    raw.call::<[u8; 0]>(Op::FREE_REGION, region.as_bytes())?;
    scene.works().context("while a file that was freed is locked")?;
    drop(raw);
    scene.works().context("after the connection's end")?;
    page.answer();
    writer.join().ok();
    Ok(())
}
