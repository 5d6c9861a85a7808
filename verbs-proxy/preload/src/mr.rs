//! Memory regions.

// UNSAFETY: entry points of a C interface.
#![allow(unsafe_code)]

pub mod ahead;
mod dmabuf;
pub mod kept;

use crate::abi::{ibv_mr, ibv_pd};
use crate::adopt::{self, Adopted};
use crate::connection::{self, Asking, Pending};
use crate::context::Context;
use crate::pages::{self, Acquired, Regions};
use crate::pd::Pd;
use crate::process::Generation;
use crate::sys::{self, Errno, Fd};
use ahead::Begun;
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ffi::{c_int, c_uint, c_void};
use ringfence_protocol::control::{
    AllocRegion, FreshReply, Handle, MAX_SEGMENTS, MrReply, NO_HANDLE, Op, RegFresh, RegMr, Segment,
};
use ringfence_protocol::keys::Incarnation;
use ringfence_protocol::verbs::Access;
use zerocopy::IntoBytes;

/// What a device may ignore: `IBV_ACCESS_OPTIONAL_RANGE`, the page size hint, and windows, of which there are none.
const IGNORED: u32 = 0x3ff0_0000 | Access::HUGETLB.0 | Access::MW_BIND.0;

/// What programs need a device for that has it. Bits that are none of these mean nothing.
const NOT_OFFERED: u32 = Access::ZERO_BASED.0 | Access::ON_DEMAND.0;

/// What we know of access flags.
const KNOWN: u32 = Access::LOCAL_WRITE.0 | Access::REMOTE_WRITE.0 | Access::REMOTE_READ.0 | Access::REMOTE_ATOMIC.0;

const WRITABLE: u32 = Access::LOCAL_WRITE.0 | Access::REMOTE_WRITE.0 | Access::REMOTE_ATOMIC.0;

const PAGE: usize = 4096;

/// Up to so many bytes, pages are registered before they are there. The proxy's worker then meets them one by one, which for more
/// takes longer than another message.
const MOST_FRESH: u64 = 64 << 10;

/// Of regions up to so many bytes the first and the last page are files of their own.
const MOST_APART: u64 = 1 << 30;

/// `IBV_REREG_MR_ERR_INPUT`: the old region is still valid.
const REREG_ERR_INPUT: c_int = -1;

/// A memory region.
#[repr(C)]
struct Mr {
    base: ibv_mr,
    /// Where provider libraries look for the region's type and access.
    provider_private: [u64; 4],
    generation: Generation,
    iova: u64,
    access: Access,
    acquired: Acquired,
    adopted: Adopted,
    /// The key that the proxy gave it; it has had `turn` others since.
    first_key: u32,
    turn: u32,
    incarnation: Incarnation,
    /// The same was registered before, and deregistered.
    comes_back: bool,
}

/// What a program asks to be registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Wanted {
    addr: usize,
    length: usize,
    iova: u64,
    access: Access,
}

impl Wanted {
    /// Bytes of the pages that it takes.
    fn bytes(&self) -> u64 {
        let end = self.addr.checked_add(self.length).and_then(|end| end.checked_next_multiple_of(PAGE));
        (end.unwrap_or(usize::MAX) - (self.addr & !(PAGE - 1))) as u64
    }

    fn is_written(&self) -> bool {
        self.access.0 & WRITABLE != 0
    }
}

impl Mr {
    fn wanted(&self) -> Wanted {
        Wanted { addr: self.base.addr as usize, length: self.base.length, iova: self.iova, access: self.access }
    }

    /// # Safety
    /// The device is still open.
    unsafe fn context<'a>(&self) -> &'a Context {
        // SAFETY: by the caller's promise.
        unsafe { Context::from_raw(self.base.context) }
    }

    /// Ends it at the proxy, and makes its pages private again.
    ///
    /// # Safety
    /// As [`Self::context`].
    unsafe fn end(&self) -> Result<(), Errno> {
        // SAFETY: by the caller's promise.
        let mut files = Files::new(self.generation, unsafe { self.context() });
        files.end(self.base.handle)?;
        // A dma-buf has no pages here.
        if self.acquired.segments.is_empty() {
            return Ok(());
        }
        adopt::release(self.base.addr as usize, self.base.length, &self.adopted, &mut files);
        Ok(())
    }
}

/// The proxy as the source of memory files.
struct Files {
    generation: Generation,
    context: u32,
    /// Whether other containers' proxies may be shown what is registered.
    shows_memory: bool,
    /// What is to be registered together with the first file, if that has just as many bytes as it needs.
    fresh: Option<RegFresh>,
    /// The request that is under way.
    pending: Option<(RegFresh, Pending)>,
    /// What came of it.
    registered: Option<Result<FreshReply, Errno>>,
}

impl Files {
    fn new(generation: Generation, context: &Context) -> Self {
        let shows_memory = context.open.shows_memory != 0;
        Self { generation, context: context.handle, shows_memory, fresh: None, pending: None, registered: None }
    }

    fn end(&self, handle: u32) -> Result<(), Errno> {
        connection::call(self.generation, Op::DEREG_MR, &Handle { handle, reserved: 0 })
    }
}

impl Regions for Files {
    fn allocate(&mut self, bytes: u64) -> Result<(u32, i32), Errno> {
        let mut fds: [Option<Fd>; 1] = [None];
        if let Some(fresh) = self.fresh.take_if(|fresh| fresh.bytes == bytes) {
            return match ahead::begin(Asking::new(self.generation)?, &fresh)? {
                Begun::Ahead { region, file, pending } => {
                    self.pending = Some((fresh, pending));
                    Ok((region, file))
                }
                Begun::New { reply, file, unfit } => {
                    if let Some(region) = unfit {
                        self.free(region);
                    }
                    self.registered = Some(Ok(reply));
                    Ok((reply.region, file.into_raw()))
                }
            };
        }
        self.settle();
        let request = AllocRegion { context: self.context, reserved: 0, bytes };
        let reply: Handle =
            connection::call_with(self.generation, Op::ALLOC_REGION, request.as_bytes(), &[], &mut fds)?;
        let [Some(file)] = fds else {
            return Err(libc::EPROTO);
        };
        Ok((reply.handle, file.into_raw()))
    }

    fn is_ready(&self, bytes: u64) -> bool {
        self.fresh.as_ref().is_some_and(|fresh| fresh.bytes == bytes) && ahead::is_there()
    }

    /// What the proxy copies of a small region is not worth the files; and of what a neighbour has seen the memory is needed twice
    /// when it is deregistered.
    fn keeps_ends_apart(&self, bytes: u64) -> bool {
        self.shows_memory && (MOST_FRESH + 1..=MOST_APART).contains(&bytes)
    }

    fn settle(&mut self) {
        if let Some((fresh, pending)) = self.pending.take() {
            let finished = ahead::finish(pending, &fresh);
            if let Ok((_, Some(unfit))) = finished {
                self.free(unfit);
            }
            self.registered = Some(finished.map(|(reply, _)| reply));
        }
    }

    fn free(&mut self, region: u32) {
        self.settle();
        let request = Handle { handle: region, reserved: 0 };
        // The proxy's end frees it too.
        let _: Result<(), Errno> = connection::call(self.generation, Op::FREE_REGION, &request);
    }
}

impl adopt::Files for Files {
    fn adopt(&mut self, file: c_int) -> Result<u32, Errno> {
        let request = Handle { handle: self.context, reserved: 0 };
        let (op, request) = (Op::ADOPT_REGION, [request.as_bytes(), &[]]);
        let reply: Handle = connection::call_passing(self.generation, op, &request, Some(file), &mut [])?;
        Ok(reply.handle)
    }
}

/// The access that the proxy shall grant; the rules of `ib_check_mr_access` in the kernel.
fn checked_access(access: u32) -> Result<Access, Errno> {
    let access = access & !IGNORED;
    let needs_local_write = Access::REMOTE_WRITE.0 | Access::REMOTE_ATOMIC.0;
    if access & needs_local_write != 0 && access & Access::LOCAL_WRITE.0 == 0 {
        return Err(libc::EINVAL);
    }
    if access & !(KNOWN | NOT_OFFERED) != 0 {
        return Err(libc::EINVAL);
    }
    if access & NOT_OFFERED != 0 {
        return Err(libc::EOPNOTSUPP);
    }
    Ok(Access(access))
}

fn checked(addr: usize, length: usize, iova: u64, access: u32) -> Result<Wanted, Errno> {
    let access = checked_access(access)?;
    if length == 0 || addr.checked_add(length).is_none() || iova.checked_add(length as u64).is_none() {
        return Err(libc::EINVAL);
    }
    Ok(Wanted { addr, length, iova, access })
}

fn register(pd: &Pd, wanted: &Wanted) -> Result<(MrReply, Acquired, Adopted), Errno> {
    let generation = pd.generation();
    // SAFETY: the domain's context outlives it.
    let mut files = Files::new(generation, unsafe { Context::from_raw(pd.context()) });
    // What a neighbour has been shown cannot be kept when it is deregistered, as that is told to it: worth more where it comes back.
    files.shows_memory &= !kept::comes_back(generation, wanted);
    let Wanted { addr, length, iova, access } = *wanted;
    let first_offset = (addr % PAGE) as u64;
    let (length_of_pages, handle) = (wanted.bytes(), pd.handle());
    files.fresh = (length_of_pages <= MOST_FRESH).then_some(RegFresh {
        context: files.context,
        pd: handle,
        bytes: length_of_pages,
        iova,
        length: length as u64,
        first_offset,
        access,
        file: NO_HANDLE,
    });
    let mut acquired = adopt::acquire(addr, length, wanted.is_written(), &mut files);
    let registered = files.registered.take().transpose();
    if let (Err(errno), Ok((_, adopted))) = (&registered, &mut acquired) {
        // The pages were moved meanwhile.
        adopt::release(addr, length, adopted, &mut files);
        adopted.settle(&mut files);
        return Err(*errno);
    }
    if let Ok(Some(FreshReply { region, handle, lkey, rkey, incarnation, .. })) = registered {
        let whole = pages::Segment { region, offset: 0, length: length_of_pages };
        match acquired {
            Ok((acquired, adopted)) if acquired.segments == [whole] && acquired.first_offset == first_offset => {
                return Ok((MrReply { handle, lkey, rkey, incarnation }, acquired, adopted));
            }
            // Some of the pages came from elsewhere, or none: it was registered too early. Where this fails, so will what follows.
            _ => drop(files.end(handle)),
        }
    }
    let (acquired, mut adopted) = acquired?;
    let segments: Vec<Segment> = acquired
        .segments
        .iter()
        .map(|segment| Segment { region: segment.region, reserved: 0, offset: segment.offset, length: segment.length })
        .collect();
    let request = RegMr {
        pd: pd.handle(),
        access,
        iova,
        length: length as u64,
        first_offset: acquired.first_offset,
        segments: segments.len() as u32,
        reserved: 0,
    };
    let reply = if segments.len() > MAX_SEGMENTS as usize {
        Err(libc::ENOMEM)
    } else {
        connection::call_with(generation, Op::REG_MR, request.as_bytes(), segments.as_bytes(), &mut [])
    };
    adopted.settle(&mut files);
    match reply {
        Ok(reply) => Ok((reply, acquired, adopted)),
        Err(errno) => {
            adopt::release(addr, length, &adopted, &mut files);
            Err(errno)
        }
    }
}

/// # Safety
/// The domain was allocated by the program, and is at `pd`.
unsafe fn registered(domain: &Pd, pd: *mut ibv_pd, wanted: &Wanted) -> Result<*mut ibv_mr, Errno> {
    let generation = domain.generation();
    // Before the pages: a forked child must not share memory of its own through the parent's connection.
    if !generation.is_current() {
        return Err(libc::EIO);
    }
    // SAFETY: the domain's context outlives it.
    if let Some(mr) = unsafe { kept::restore(generation, pd, wanted) } {
        return Ok(Box::into_raw(mr).cast());
    }
    let mut result = register(domain, wanted);
    // What is kept must not be what there is no room beside.
    if result.as_ref().is_err_and(|errno| *errno == libc::ENOMEM) && kept::give_up(generation, |_| true) {
        result = register(domain, wanted);
    }
    let (reply, acquired, adopted) = result?;
    let base = ibv_mr {
        context: domain.context(),
        pd,
        addr: core::ptr::with_exposed_provenance_mut(wanted.addr),
        length: wanted.length,
        handle: reply.handle,
        lkey: reply.lkey,
        rkey: reply.rkey,
    };
    let mr = Mr {
        base,
        provider_private: [0; 4],
        generation,
        iova: wanted.iova,
        access: wanted.access,
        acquired,
        adopted,
        first_key: reply.lkey,
        turn: 0,
        incarnation: Incarnation::new(reply.incarnation),
        comes_back: kept::comes_back(generation, wanted),
    };
    Ok(Box::into_raw(Box::new(mr)).cast())
}

/// `ibv_reg_mr_iova2`, which every registration of ordinary memory comes down to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_reg_mr_iova2(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    iova: u64,
    access: c_uint,
) -> *mut ibv_mr {
    let wanted = checked(addr as usize, length, iova, access);
    // SAFETY: the caller allocated the domain.
    sys::pointer_or_errno(wanted.and_then(|wanted| unsafe { registered(Pd::from_raw(pd), pd, &wanted) }))
}

/// `ibv_reg_mr(3)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_reg_mr(pd: *mut ibv_pd, addr: *mut c_void, length: usize, access: c_int) -> *mut ibv_mr {
    // SAFETY: the same contract.
    unsafe { ibv_reg_mr_iova2(pd, addr, length, addr as u64, access as c_uint) }
}

/// `ibv_reg_mr_iova(3)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_reg_mr_iova(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    iova: u64,
    access: c_int,
) -> *mut ibv_mr {
    // SAFETY: the same contract.
    unsafe { ibv_reg_mr_iova2(pd, addr, length, iova, access as c_uint) }
}

/// `ibv_dereg_mr(3)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_dereg_mr(mr: *mut ibv_mr) -> c_int {
    // SAFETY: the caller registered the region with one of the functions above, and gives it up; the device is open.
    let result = unsafe {
        let region = &*mr.cast::<Mr>();
        if kept::withdraw(region) {
            kept::keep(Box::from_raw(mr.cast()));
            Ok(())
        } else {
            region.end().map(|()| drop(Box::from_raw(mr.cast::<Mr>())))
        }
    };
    sys::zero_or_errno(result)
}

/// `ibv_rereg_mr(3)`: not offered; the old region stays as it is.
#[unsafe(no_mangle)]
pub extern "C" fn ibv_rereg_mr() -> c_int {
    sys::set_errno(libc::EOPNOTSUPP);
    REREG_ERR_INPUT
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn access_follows_the_kernels_rules() {
        let cases = [
            (0, Ok(Access(0))),
            (Access::LOCAL_WRITE.0 | Access::REMOTE_WRITE.0, Ok(Access(3))),
            (Access::REMOTE_READ.0 | Access::RELAXED_ORDERING.0, Ok(Access::REMOTE_READ)),
            (Access::REMOTE_WRITE.0, Err(libc::EINVAL)),
            (Access::REMOTE_ATOMIC.0, Err(libc::EINVAL)),
            (Access::ON_DEMAND.0, Err(libc::EOPNOTSUPP)),
            (Access::ZERO_BASED.0, Err(libc::EOPNOTSUPP)),
            (1 << 8, Err(libc::EINVAL)),
            (1 << 31, Err(libc::EINVAL)),
            (Access::MW_BIND.0 | Access::HUGETLB.0, Ok(Access(0))),
        ];
        for (asked, expected) in cases {
            assert_eq!(checked_access(asked), expected, "access {asked:#x}");
        }
    }
}
