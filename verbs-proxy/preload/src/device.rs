//! The device list.

// UNSAFETY: entry points of a C interface.
#![allow(unsafe_code)]

use crate::abi::{NAME_MAX, PATH_MAX, ibv_device};
use crate::connection::{self, Connection};
use crate::lock::Spin;
use crate::sys::{self, Errno};
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ffi::{c_char, c_int};
use core::ptr;
use ringfence_protocol::control::{DeviceInfo, Index, Op};

/// A device of one connection. It lives as long as the process: programs keep pointers to devices that they did not
/// open, and there are few.
#[repr(C)]
pub struct Device {
    base: ibv_device,
    /// Where provider libraries look for the pointer that tells them whether a device is theirs. Null: it is not.
    provider_private: [u64; 16],
    /// Of the list.
    pub index: u32,
    /// Network order.
    pub guid: u64,
    /// Of the connection that listed it.
    pub connection: Connection,
}

// SAFETY: never changed after its making; its pointers are null.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

static DEVICES: Spin<Vec<&'static Device>> = Spin::new(Vec::new());

/// A new connection begins: its devices are to be asked for.
pub fn forget() {
    // SAFETY: the caller holds the control lock. After a fork, a thread that is not there any more may have held the
    // lock; otherwise opening it early would at worst let a reader see the list's old or new contents.
    unsafe { DEVICES.unlock() };
    DEVICES.lock().clear();
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

    fn ask(connection: &Connection, index: u32) -> Result<Self, Errno> {
        let request = Index { index, reserved: 0 };
        let info: DeviceInfo = connection::call(connection.generation, Op::DEVICE, &request)?;
        let length = info.name.iter().position(|&byte| byte == 0).ok_or(libc::EPROTO)?;
        let name = &info.name[..length];
        let mut digits = [b'0'; 10];
        let number = decimal(index, &mut digits);
        Ok(Self {
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
            guid: info.node_guid,
            connection: *connection,
        })
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
    if let Some(known) = known_devices(&connection) {
        return Ok(known);
    }
    let mut devices = Vec::new();
    for index in 0..connection.devices {
        devices.push(&*Box::leak(Box::new(Device::ask(&connection, index)?)));
    }
    // Two threads may come here at once; then both pairs of pointers stay valid, and later calls get the first.
    if let Some(known) = known_devices(&connection) {
        return Ok(known);
    }
    DEVICES.lock().clone_from(&devices);
    Ok(devices)
}

fn known_devices(connection: &Connection) -> Option<Vec<&'static Device>> {
    let known = DEVICES.lock();
    let same = known.first().is_some_and(|device| device.connection.generation == connection.generation);
    same.then(|| known.clone())
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

/// `ibv_get_device_index(3)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_get_device_index(device: *mut ibv_device) -> c_int {
    // SAFETY: the caller got the device from the list.
    unsafe { Device::from_raw(device) }.index as c_int
}

#[cfg(test)]
mod tests {
    use super::*;

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
