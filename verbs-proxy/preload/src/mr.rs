//! Memory regions.

// UNSAFETY: entry points of a C interface.
#![allow(unsafe_code)]

use crate::abi::{ibv_mr, ibv_pd};
use crate::adopt::{self, Adopted};
use crate::connection;
use crate::context::Context;
use crate::pages::Regions;
use crate::pd::Pd;
use crate::process::Generation;
use crate::sys::{self, Errno, Fd};
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ffi::{c_int, c_uint, c_void};
use ringfence_protocol::control::{AllocRegion, Handle, MAX_SEGMENTS, MrReply, Op, RegMr, Segment};
use ringfence_protocol::verbs::Access;
use zerocopy::IntoBytes;

/// What a device may ignore: `IBV_ACCESS_OPTIONAL_RANGE`, the page size hint, and windows, of which there are none.
const IGNORED: u32 = 0x3ff0_0000 | Access::HUGETLB.0 | Access::MW_BIND.0;

/// What programs need a device for that has it. Bits that are none of these mean nothing.
const NOT_OFFERED: u32 = Access::ZERO_BASED.0 | Access::ON_DEMAND.0;

/// What we know of access flags.
const KNOWN: u32 = Access::LOCAL_WRITE.0 | Access::REMOTE_WRITE.0 | Access::REMOTE_READ.0 | Access::REMOTE_ATOMIC.0;

const WRITABLE: u32 = Access::LOCAL_WRITE.0 | Access::REMOTE_WRITE.0 | Access::REMOTE_ATOMIC.0;

/// `IBV_REREG_MR_ERR_INPUT`: the old region is still valid.
const REREG_ERR_INPUT: c_int = -1;

#[repr(C)]
struct Mr {
    base: ibv_mr,
    /// Where provider libraries look for the region's type and access.
    provider_private: [u64; 4],
    generation: Generation,
    adopted: Adopted,
}

/// The proxy as the source of memory files.
struct Files {
    generation: Generation,
    context: u32,
}

impl Regions for Files {
    fn allocate(&mut self, bytes: u64) -> Result<(u32, i32), Errno> {
        let request = AllocRegion { context: self.context, reserved: 0, bytes };
        let mut fds: [Option<Fd>; 1] = [None];
        let reply: Handle =
            connection::call_with(self.generation, Op::ALLOC_REGION, request.as_bytes(), &[], &mut fds)?;
        let [Some(file)] = fds else {
            return Err(libc::EPROTO);
        };
        Ok((reply.handle, file.into_raw()))
    }

    fn free(&mut self, region: u32) {
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

fn register(pd: &Pd, addr: usize, length: usize, iova: u64, access: u32) -> Result<(MrReply, Adopted), Errno> {
    let access = checked_access(access)?;
    if length == 0 || addr.checked_add(length).is_none() || iova.checked_add(length as u64).is_none() {
        return Err(libc::EINVAL);
    }
    let generation = pd.generation();
    // Before the pages: a forked child must not share memory of its own through the parent's connection.
    if !generation.is_current() {
        return Err(libc::EIO);
    }
    // SAFETY: the domain's context outlives it.
    let context = unsafe { Context::from_raw(pd.context()) }.handle;
    let mut files = Files { generation, context };
    let (acquired, mut adopted) = adopt::acquire(addr, length, access.0 & WRITABLE != 0, &mut files)?;
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
        Ok(reply) => Ok((reply, adopted)),
        Err(error) => {
            adopt::release(addr, length, &adopted, &mut files);
            Err(error)
        }
    }
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
    // SAFETY: the caller allocated the domain.
    let domain = unsafe { Pd::from_raw(pd) };
    sys::pointer_or_errno(register(domain, addr as usize, length, iova, access).map(|(reply, adopted)| {
        let base = ibv_mr {
            context: domain.context(),
            pd,
            addr,
            length,
            handle: reply.handle,
            lkey: reply.lkey,
            rkey: reply.rkey,
        };
        let mr = Mr { base, provider_private: [0; 4], generation: domain.generation(), adopted };
        Box::into_raw(Box::new(mr)).cast()
    }))
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
    // SAFETY: the caller registered the region with one of the functions above.
    let region = unsafe { &*mr.cast::<Mr>() };
    let request = Handle { handle: region.base.handle, reserved: 0 };
    let result: Result<(), Errno> = connection::call(region.generation, Op::DEREG_MR, &request);
    sys::zero_or_errno(result.map(|()| {
        // SAFETY: the region's context outlives it.
        let context = unsafe { Context::from_raw(region.base.context) }.handle;
        let mut files = Files { generation: region.generation, context };
        adopt::release(region.base.addr as usize, region.base.length, &region.adopted, &mut files);
        // SAFETY: allocated by `ibv_reg_mr_iova2`, and the caller gives it up.
        drop(unsafe { Box::from_raw(mr.cast::<Mr>()) });
    }))
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
