//! Memory: the files behind it, and the regions registered from them.

use super::{Answer, Session};
use crate::control::adopted::RegionFile;
use crate::control::driver::Driver;
use crate::control::lent::Lent;
use crate::control::node::Node;
use crate::control::quota::{Resource, Taken};
use crate::control::shown::whole_files;
use crate::control::spares::{Fresh, Kind, Spare};
use crate::device::control::Control;
use crate::fabric::neighbours::{Backing, SharedRun, amount};
use crate::memory::{Granted, MemoryRegion, PdId};
use crate::shared::{Mapping, PAGE, Run, RunFile};
use ringfence_protocol::control::{
    AllocRegion, FreshReply, Handle, MrReply, NO_HANDLE, RegDmabuf, RegFresh, RegMr, Segment,
};
use ringfence_protocol::verbs::Access;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::mm::ProtFlags;
use std::cell::Cell;
use std::sync::Arc;
use zerocopy::FromBytes;

/// Mappings up to this size have their page tables filled when they are made; larger ones as they are used.
const POPULATE: u64 = 256 << 20;

#[derive(Debug)]
pub(super) struct Region {
    file: Arc<RegionFile>,
    /// For a file of the container's, which counts for itself: its name here.
    _taken: Option<Taken>,
    /// It was given out for a registration to come, and takes nothing of the quota before.
    ahead: Option<(Kind, Mapping)>,
}

#[derive(Debug)]
pub(super) struct Mr {
    share: u32,
    pub(super) pd: u32,
    _taken: Taken,
}

/// A region that the data plane has.
#[derive(Debug)]
struct Registered {
    /// What reaches it.
    granted: Granted,
    /// What peers reach it by.
    rkey: u32,
    /// Its name for neighbours.
    share: u32,
}

impl Session {
    pub(super) fn alloc_region<D: Driver>(
        &mut self,
        request: &AllocRegion,
        node: &mut Node<D>,
    ) -> Result<Answer, Errno> {
        if request.bytes == 0 || !request.bytes.is_multiple_of(PAGE as u64) {
            return Err(Errno::INVAL);
        }
        let bytes = usize::try_from(request.bytes).map_err(|_| Errno::NOMEM)?;
        let taken = self.taken(request.context, request.bytes, node)?;
        let (file, theirs) = lent(Fresh::create(bytes)?, node)?;
        file.charge(taken);
        let handle = self.add_region(file, None);
        Ok(Answer::of(Handle { handle, reserved: 0 }).with(theirs))
    }

    /// What a file of so many bytes takes of the quota.
    fn taken<D: Driver>(&mut self, context: u32, bytes: u64, node: &mut Node<D>) -> Result<Vec<Taken>, Errno> {
        self.contexts.get(context)?;
        node.pressing(|node| Ok(vec![node.take(Resource::Region, 1)?, node.take(Resource::RegionBytes, bytes)?]))
    }

    fn add_region(&mut self, file: Lent, ahead: Option<(Kind, Mapping)>) -> u32 {
        self.regions.insert(Region { file: Arc::new(RegionFile::Lent(file)), _taken: None, ahead })
    }

    /// Takes in a memory file of the container's own.
    pub(super) fn adopt_region<D: Driver>(
        &mut self,
        context: u32,
        fd: OwnedFd,
        node: &mut Node<D>,
    ) -> Result<Answer, Errno> {
        let closer = &node.closers.container;
        let taken = self.contexts.get(context).and_then(|_| node.quota.take(Resource::Region, 1));
        // Without holes being watched for, nothing of the kind can be mapped.
        let (taken, _) = match taken.and_then(|taken| Ok((taken, node.holes.as_ref().ok_or(Errno::OPNOTSUPP)?))) {
            Ok(ready) => ready,
            Err(error) => {
                closer.close(fd);
                return Err(error);
            }
        };
        let file = node.adopted.adopt(fd, &node.quota, closer)?;
        let handle = self.regions.insert(Region { file, _taken: Some(taken), ahead: None });
        Ok(Answer::of(Handle { handle, reserved: 0 }))
    }

    /// Memory regions made from it keep its pages.
    pub(super) fn free_region(&mut self, handle: u32) -> Result<Answer, Errno> {
        self.regions.remove(handle)?;
        self.ahead = self.ahead.filter(|ahead| *ahead != handle);
        Ok(Answer::default())
    }

    pub(super) fn reg_mr<D: Driver>(
        &mut self,
        request: &RegMr,
        segments: &[Segment],
        node: &mut Node<D>,
    ) -> Result<Answer, Errno> {
        self.register(request, segments, None, node)
    }

    /// `mapping`: of the segments, if they are mapped already.
    fn register<D: Driver>(
        &mut self,
        request: &RegMr,
        segments: &[Segment],
        mapping: Option<Mapping>,
        node: &mut Node<D>,
    ) -> Result<Answer, Errno> {
        check_access(request.access)?;
        if request.length == 0 || request.first_offset >= PAGE as u64 || segments.is_empty() {
            return Err(Errno::INVAL);
        }
        let pd = self.pds.get(request.pd)?;
        let pd_id = pd.id;
        let mut runs = Vec::with_capacity(segments.len());
        for segment in segments {
            let region = self.regions.get(segment.region)?;
            if region.ahead.is_some() {
                return Err(Errno::INVAL);
            }
            let file = Arc::clone(&region.file);
            let end = segment.offset.checked_add(segment.length).ok_or(Errno::INVAL)?;
            if !(segment.offset | segment.length).is_multiple_of(PAGE as u64) || segment.length == 0 {
                return Err(Errno::INVAL);
            }
            match &*file {
                RegionFile::Lent(file) if end > file.bytes() as u64 => return Err(Errno::INVAL),
                // Whoever touches what lies behind the end would get a signal.
                RegionFile::Adopted(file) if end > file.bytes_now()?.next_multiple_of(file.page() as u64) => {
                    return Err(Errno::FAULT);
                }
                _ => {}
            }
            runs.push(SharedRun { file, offset: segment.offset, bytes: segment.length });
        }
        // No page more than the region needs: mapping costs memory that only its length is charged for.
        let needed =
            request.first_offset.checked_add(request.length).and_then(|end| end.checked_next_multiple_of(PAGE as u64));
        if runs.iter().try_fold(0u64, |sum, run| sum.checked_add(run.bytes)) != needed || needed.is_none() {
            return Err(Errno::INVAL);
        }
        let taken = node.take(Resource::MrHandle, 1)?;
        let mapping = Cell::new(mapping);
        let registered = node.pressing(|node| register(request, pd_id, &runs, &mapping, node))?;
        self.name_region(request.pd, taken, registered)
    }

    /// What is registered in a domain gets a handle.
    fn name_region(&mut self, pd: u32, taken: Taken, registered: Registered) -> Result<Answer, Errno> {
        let Registered { granted, rkey, share } = registered;
        self.pds.get(pd)?.users += 1;
        let handle = self.mrs.insert(Mr { share, pd, _taken: taken });
        let incarnation = granted.incarnation.number();
        Ok(Answer::of(MrReply { handle, lkey: granted.key, rkey, incarnation }))
    }

    /// A buffer of another device's, which a card reaches, and nobody here.
    pub(super) fn reg_dmabuf<D: Driver>(
        &mut self,
        request: &RegDmabuf,
        fd: OwnedFd,
        node: &mut Node<D>,
    ) -> Result<Answer, Errno> {
        let registered = self.reg_dmabuf_of(request, fd.as_fd(), node);
        // The kernel has the buffer, if it is registered.
        node.closers.container.close(fd);
        registered
    }

    fn reg_dmabuf_of<D: Driver>(
        &mut self,
        request: &RegDmabuf,
        fd: BorrowedFd<'_>,
        node: &mut Node<D>,
    ) -> Result<Answer, Errno> {
        check_access(request.access)?;
        if request.length == 0 || request.offset.checked_add(request.length).is_none() {
            return Err(Errno::INVAL);
        }
        let pd = self.pds.get(request.pd)?.id;
        let taken = node.take(Resource::MrHandle, 1)?;
        let registered = node.pressing(|node| register_dmabuf(request, pd, fd, node))?;
        self.name_region(request.pd, taken, registered)
    }

    /// Both in one message: a program that registers a small buffer waits for messages more than for anything else.
    pub(super) fn reg_fresh<D: Driver>(&mut self, request: &RegFresh, node: &mut Node<D>) -> Result<Answer, Errno> {
        let kind = Kind::of(request).ok_or(Errno::INVAL)?;
        let taken = self.taken(request.context, request.bytes, node)?;
        let (region, mapping, theirs) = if request.file == NO_HANDLE {
            let Spare { fresh, mapping } = node.spares.take(kind)?;
            let (file, theirs) = lent(fresh, node)?;
            file.charge(taken);
            (self.add_region(file, None), mapping, Some(theirs))
        } else {
            (request.file, self.take_ahead(request.file, kind, taken)?, None)
        };
        let end = request.first_offset.checked_add(request.length);
        let pages = end.and_then(|end| end.checked_next_multiple_of(PAGE as u64)).unwrap_or(0);
        let of_file = RegMr {
            pd: request.pd,
            access: request.access,
            iova: request.iova,
            length: request.length,
            first_offset: request.first_offset,
            segments: 1,
            reserved: 0,
        };
        let segment = Segment { region, reserved: 0, offset: 0, length: pages };
        let mapping = Some(mapping).filter(|mapping| mapping.bytes() as u64 == pages);
        let registered = self
            .register(&of_file, &[segment], mapping, node)
            .and_then(|registered| MrReply::read_from_bytes(&registered.body).map_err(|_| Errno::INVAL));
        let MrReply { handle, lkey, rkey, incarnation } = match registered {
            Ok(registered) => registered,
            // The process has its pages in the file that was given out before, and gives it back when it has none there.
            Err(error) if theirs.is_none() => return Err(error),
            Err(error) => return self.free_region(region).and(Err(error)),
        };
        let next = self.give_ahead(kind, node);
        let ahead = next.as_ref().map_or(NO_HANDLE, |(handle, _)| *handle);
        let answer = Answer::of(FreshReply { region, handle, lkey, rkey, incarnation, ahead });
        Ok([theirs, next.map(|(_, fd)| fd)].into_iter().flatten().fold(answer, Answer::with))
    }

    /// The mapping of a file that was given out in advance, which takes `taken` of the quota from now on.
    fn take_ahead(&mut self, handle: u32, kind: Kind, taken: Vec<Taken>) -> Result<Mapping, Errno> {
        let region = self.regions.get(handle)?;
        let RegionFile::Lent(file) = &*region.file else { return Err(Errno::INVAL) };
        let (_, mapping) = region.ahead.take_if(|(ahead, _)| *ahead == kind).ok_or(Errno::INVAL)?;
        file.charge(taken);
        self.ahead = None;
        Ok(mapping)
    }

    /// Gives a file out for another registration of this kind. There is one at most, however often the process says that it has
    /// none: it may have pages there.
    fn give_ahead<D: Driver>(&mut self, kind: Kind, node: &mut Node<D>) -> Option<(u32, OwnedFd)> {
        if self.ahead.is_some() {
            return None;
        }
        let Spare { fresh, mapping } = node.spares.take(kind).ok()?;
        let (file, theirs) = lent(fresh, node).ok()?;
        let handle = self.add_region(file, Some((kind, mapping)));
        self.ahead = Some(handle);
        Some((handle, theirs))
    }

    pub(super) fn dereg_mr<D: Driver>(&mut self, handle: u32, node: &mut Node<D>) -> Result<Answer, Errno> {
        let mr = self.mrs.remove(handle)?;
        if let Ok(pd) = self.pds.get(mr.pd) {
            pd.users -= 1;
        }
        // It may have been revoked.
        if let Some(granted) = node.shares.get(&mr.share).map(|backing| backing.granted) {
            // Unmapped here: taking page tables down may take milliseconds, which the worker does not have.
            drop(node.worker.call(move |plane| plane.regions.remove(granted)));
            D::forget_share(node, mr.share);
        }
        Ok(Answer::default())
    }
}

/// Whether a region may have these rights.
fn check_access(access: Access) -> Result<(), Errno> {
    let known = Access::LOCAL_WRITE
        | Access::REMOTE_WRITE
        | Access::REMOTE_READ
        | Access::REMOTE_ATOMIC
        | Access::RELAXED_ORDERING;
    // Remote rights to write need the local right (InfiniBand Architecture Specification, 11.2.8.2).
    let writes = access.0 & (Access::REMOTE_WRITE | Access::REMOTE_ATOMIC).0 != 0;
    if access.0 & !known.0 != 0 || (writes && !access.contains(Access::LOCAL_WRITE)) {
        return Err(if access.0 & !known.0 & 0x0fff != 0 { Errno::OPNOTSUPP } else { Errno::INVAL });
    }
    Ok(())
}

/// As [`register`], of a buffer that is nobody's memory here.
fn register_dmabuf<D: Driver>(
    request: &RegDmabuf,
    pd: PdId,
    fd: BorrowedFd<'_>,
    node: &mut Node<D>,
) -> Result<Registered, Errno> {
    let taken = [node.take(Resource::Mr, 1)?, node.take(Resource::MrBytes, request.length)?];
    let lease = node.neighbours.budget.take_own(amount(std::iter::once(request.length)))?;
    let mapping = Mapping::of_nothing(usize::try_from(request.length).map_err(|_| Errno::NOMEM)?)?;
    let share = node.next_share();
    let (length, iova) = (request.length, request.iova);
    let region =
        MemoryRegion::new(Arc::new(mapping), 0, length, iova, pd, request.access, share).ok_or(Errno::INVAL)?;
    let Node { entrance, device, .. } = node;
    let (region, rkey) = device.register_dmabuf(region, fd, request.offset)?;
    let granted = entrance.insert(region, || device.key()).ok_or(Errno::NOMEM)?;
    node.shares.insert(share, Backing { granted, shown: Vec::new(), lease, taken });
    Ok(Registered { granted, rkey: rkey.unwrap_or(granted.key), share })
}

/// A file that the container is given, and its descriptor.
fn lent<D: Driver>(fresh: Fresh, node: &Node<D>) -> Result<(Lent, OwnedFd), Errno> {
    let Fresh { file, theirs } = fresh;
    let file = Lent::of(file, &node.closers.container, Some(node.warden.emptier()));
    Ok((node.quota.keep(file)?, theirs))
}

/// Maps the runs side by side, unless they are, and hands the region to the data plane.
fn register<D: Driver>(
    request: &RegMr,
    pd: PdId,
    runs: &[SharedRun],
    mapping: &Cell<Option<Mapping>>,
    node: &mut Node<D>,
) -> Result<Registered, Errno> {
    let taken = [node.take(Resource::Mr, 1)?, node.take(Resource::MrBytes, request.length)?];
    let total: u64 = runs.iter().map(|run| run.bytes).sum();
    let holes = node.holes.as_ref();
    let mapped = runs.iter().map(|run| {
        let file = match &*run.file {
            RegionFile::Lent(file) => RunFile::Sealed(file),
            RegionFile::Adopted(file) => RunFile::Foreign(file, holes.ok_or(Errno::OPNOTSUPP)?),
        };
        Ok(Run { file, offset: run.offset as usize, bytes: run.bytes as usize })
    });
    let mapped = mapped.collect::<Result<Vec<_>, Errno>>()?;
    // Huge pages are mapped whole, at an address that is a multiple of them.
    let covered = |run: &SharedRun| run.bytes + 3 * (run.file.page() as u64 - PAGE as u64);
    let lease = node.neighbours.budget.take_own(amount(runs.iter().map(covered)))?;
    // Every right to write needs the local one.
    let writable = request.access.contains(Access::LOCAL_WRITE);
    let protection = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
    let mapping = match mapping.take() {
        Some(mapping) => mapping,
        None => Mapping::of_runs(&mapped, protection, total <= POPULATE)?,
    };
    let mapping = Arc::new(mapping);
    let share = node.next_share();
    let (first, length, iova) = (request.first_offset as usize, request.length, request.iova);
    let region = MemoryRegion::new(mapping, first, length, iova, pd, request.access, share).ok_or(Errno::INVAL)?;
    let (bytes, shown) = whole_files(runs, &(request.first_offset..request.first_offset.saturating_add(length)));
    let Node { entrance, device, .. } = node;
    let (region, rkey) = device.register(region.shown(bytes))?;
    let granted = entrance.insert(region, || device.key()).ok_or(Errno::NOMEM)?;
    node.shares.insert(share, Backing { granted, shown, lease, taken });
    Ok(Registered { granted, rkey: rkey.unwrap_or(granted.key), share })
}
