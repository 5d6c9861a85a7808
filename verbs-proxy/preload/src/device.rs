//! The device list.
//!
//! A device is a fact about the machine, not part of a connection: a program may list devices, fork or close every
//! descriptor, and then open what it chose.

// UNSAFETY: entry points of a C interface.
#![allow(unsafe_code)]

use crate::abi::{NAME_MAX, PATH_MAX, ibv_device};
use crate::connection::{self, Connection};
use crate::sys::{self, Errno};
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ffi::{c_char, c_int};
use core::iter;
use core::ptr;
use core::sync::atomic::{AtomicPtr, AtomicU32, Ordering};
use ringfence_protocol::control::{DeviceInfo, Index, Op};

/// A device. It lives as long as the process: programs keep pointers to devices that they did not open, and there are few.
#[repr(C)]
pub struct Device {
    base: ibv_device,
    /// Where provider libraries look for the pointer that tells them whether a device is theirs. Null: it is not.
    provider_private: [u64; 16],
    /// Of the list.
    pub index: u32,
    /// The kernel's number of it, by which librdmacm knows it.
    number: u32,
    /// Network order.
    pub guid: u64,
    /// The last generation in which the proxy listed it; zero for none.
    listed: AtomicU32,
    /// The one that became known before it.
    next: AtomicPtr<Device>,
}

// SAFETY: all but its atomics is never changed after its making; its pointers are null or devices, which live forever.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

/// The device that became known last. Devices are only ever added, so that a child that was forked in the middle of it finds
/// the list whole.
static KNOWN: AtomicPtr<Device> = AtomicPtr::new(ptr::null_mut());

fn known() -> impl Iterator<Item = &'static Device> {
    let follow = |device: *mut Device| {
        // SAFETY: null, or a device, which lives forever.
        unsafe { device.cast_const().as_ref() }
    };
    iter::successors(follow(KNOWN.load(Ordering::Acquire)), move |device| follow(device.next.load(Ordering::Acquire)))
}

impl Device {
    /// The device behind a pointer that a program got from us.
    ///
    /// # Safety
    /// The pointer came from [`ibv_get_device_list`].
    pub unsafe fn from_raw<'a>(device: *mut ibv_device) -> &'a Self {
        // SAFETY: the list only has pointers to the `base` of a `Device`, its first field.
        unsafe { &*device.cast::<Self>() }
    }

    /// The pointer that programs know.
    pub fn as_raw(&self) -> *mut ibv_device {
        ptr::from_ref(&self.base).cast_mut()
    }

    /// The proxy's n-th device, asked for once a connection.
    fn nth(connection: &Connection, index: u32) -> Result<&'static Self, Errno> {
        let generation = connection.generation.number();
        let listed = |device: &&Self| device.index == index && device.listed.load(Ordering::Relaxed) == generation;
        if let Some(device) = known().find(listed) {
            return Ok(device);
        }
        let device = Self::ask(connection, index)?.find_or_add();
        device.listed.store(generation, Ordering::Relaxed);
        Ok(device)
    }

    fn is_same_as(&self, other: &Self) -> bool {
        let names = |device: &Self| (device.index, device.number, device.guid, device.base.name);
        names(self) == names(other)
    }

    /// The one that programs know already, or this from now on.
    fn find_or_add(self: Box<Self>) -> &'static Self {
        let fresh = Box::into_raw(self);
        // SAFETY: nobody else knows it before it is added, and from then on it lives forever.
        let this = unsafe { &*fresh };
        loop {
            let last = KNOWN.load(Ordering::Acquire);
            if let Some(found) = known().find(|device| device.is_same_as(this)) {
                // SAFETY: it was not added, and `this` is not used any more.
                drop(unsafe { Box::from_raw(fresh) });
                return found;
            }
            this.next.store(last, Ordering::Relaxed);
            if KNOWN.compare_exchange(last, fresh, Ordering::AcqRel, Ordering::Acquire).is_ok() {
                return this;
            }
        }
    }

    fn ask(connection: &Connection, index: u32) -> Result<Box<Self>, Errno> {
        let request = Index { index, reserved: 0 };
        let info: DeviceInfo = connection::call(connection.generation, Op::DEVICE, &request)?;
        let length = info.name.iter().position(|&byte| byte == 0).ok_or(libc::EPROTO)?;
        let name = &info.name[..length];
        let mut digits = [b'0'; 10];
        let number = decimal(index, &mut digits);
        Ok(Box::new(Self {
            base: ibv_device {
                ops: [None; 2],
                node_type: info.node_type as c_int,
                transport_type: info.transport as c_int,
                name: c_chars::<NAME_MAX>(&[name]),
                dev_name: c_chars::<NAME_MAX>(&[b"uverbs", number]),
                dev_path: c_chars::<PATH_MAX>(&[b"/sys/class/infiniband_verbs/uverbs", number]),
                ibdev_path: c_chars::<PATH_MAX>(&[b"/sys/class/infiniband/", name]),
            },
            provider_private: [0; 16],
            index,
            number: info.index,
            guid: info.node_guid,
            listed: AtomicU32::new(0),
            next: AtomicPtr::new(ptr::null_mut()),
        }))
    }
}

/// The parts, one behind the other, zero-terminated.
fn c_chars<const N: usize>(parts: &[&[u8]]) -> [c_char; N] {
    let mut text = [0; N];
    let bytes = parts.iter().flat_map(|part| part.iter());
    for (to, from) in text[..N - 1].iter_mut().zip(bytes) {
        *to = *from as c_char;
    }
    text
}

fn decimal(mut number: u32, digits: &mut [u8; 10]) -> &[u8] {
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 || at == 0 {
            return &digits[at..];
        }
    }
}

fn list() -> Result<Vec<&'static Device>, Errno> {
    let connection = match connection::connect() {
        Ok(connection) => connection,
        // No proxy: a machine without RDMA devices.
        Err(libc::ENOENT | libc::ENOTDIR | libc::ECONNREFUSED | libc::EACCES | libc::EPERM) => return Ok(Vec::new()),
        Err(errno) => return Err(errno),
    };
    (0..connection.devices).map(|index| Device::nth(&connection, index)).collect()
}

/// `ibv_get_device_list(3)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_get_device_list(count: *mut c_int) -> *mut *mut ibv_device {
    let devices = list();
    if !count.is_null() {
        // SAFETY: the caller gave a place for the number.
        unsafe { *count = devices.as_ref().map_or(0, |devices| devices.len() as c_int) };
    }
    sys::pointer_or_errno(devices.and_then(|devices| {
        // From the C library, because programs are known to call `free` on it.
        // SAFETY: `calloc` takes any size.
        let list = unsafe { libc::calloc(devices.len() + 1, size_of::<*mut ibv_device>()) }.cast::<*mut ibv_device>();
        if list.is_null() {
            return Err(libc::ENOMEM);
        }
        for (index, device) in devices.iter().enumerate() {
            // SAFETY: the list has a place for each device and one for the null at its end.
            unsafe { *list.add(index) = device.as_raw() };
        }
        Ok(list)
    }))
}

/// `ibv_free_device_list(3)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_free_device_list(list: *mut *mut ibv_device) {
    // SAFETY: allocated by `ibv_get_device_list` with `calloc`.
    unsafe { libc::free(list.cast()) };
}

/// `ibv_get_device_name(3)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_get_device_name(device: *mut ibv_device) -> *const c_char {
    // SAFETY: the caller got the device from the list.
    unsafe { (&raw const (*device).name).cast() }
}

/// `ibv_get_device_guid(3)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_get_device_guid(device: *mut ibv_device) -> u64 {
    // SAFETY: the caller got the device from the list.
    unsafe { Device::from_raw(device) }.guid
}

/// `ibv_get_device_index(3)`: -1 if nobody knows.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_get_device_index(device: *mut ibv_device) -> c_int {
    // SAFETY: the caller got the device from the list.
    unsafe { Device::from_raw(device) }.number as c_int
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(index: u32, guid: u64) -> Box<Device> {
        // SAFETY: all of it is numbers and null pointers.
        let device: Device = unsafe { core::mem::zeroed() };
        Box::new(Device { index, guid, ..device })
    }

    #[test]
    fn a_device_that_is_listed_again_is_the_same() {
        let one = device(1000, 7).find_or_add();
        let other = device(1000, 8).find_or_add();
        assert!(!ptr::eq(one, other));
        assert!(ptr::eq(one, device(1000, 7).find_or_add()));
        assert!(ptr::eq(other, device(1000, 8).find_or_add()));
    }

    #[test]
    fn numbers_are_written_in_full() {
        for (number, expected) in [(0, "0"), (7, "7"), (10, "10"), (u32::MAX, "4294967295")] {
            assert_eq!(decimal(number, &mut [0; 10]), expected.as_bytes());
        }
    }

    #[test]
    fn long_names_stay_terminated() {
        let text = c_chars::<4>(&[b"ab", b"cdef"]);
        assert_eq!(text.map(|byte| byte as u8), *b"abc\0");
    }
}
