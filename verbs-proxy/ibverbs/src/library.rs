//! libibverbs of this machine, loaded when the proxy starts.
//!
//! Loaded rather than linked against: the workspace is built on machines that have neither the library nor its headers, and where it
//! is missing at run time the hook gets a line that says so, instead of a proxy that the dynamic linker ends before `main`. Symbols
//! are looked up in their newest version, which is what a linker would have chosen, too.

// UNSAFETY: calls C functions through pointers that were looked up by name.
#![allow(unsafe_code)]

use anyhow::{Result, bail};
use ringfence_abi::{
    ibv_async_event, ibv_comp_channel, ibv_context, ibv_cq, ibv_device, ibv_device_attr, ibv_gid_entry, ibv_mr, ibv_pd,
    ibv_port_attr, ibv_qp, ibv_qp_attr, ibv_qp_init_attr,
};
use std::ffi::{CStr, c_int, c_uint, c_void};

macro_rules! library {
    ($($name:ident = $symbol:literal: fn($($argument:ty),*) $(-> $result:ty)?;)*
     [newer] $($newer:ident = $newer_symbol:literal: fn($($newer_argument:ty),*) $(-> $newer_result:ty)?;)*) => {
        /// The functions of libibverbs that the proxy calls, by their names without the prefix. Everybody who calls one keeps to its
        /// manual page.
        #[derive(Debug)]
        pub struct Library {
            $(#[allow(missing_docs)] pub $name: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
            $(#[allow(missing_docs)] pub $newer: Option<unsafe extern "C" fn($($newer_argument),*) $(-> $newer_result)?>,)*
        }

        impl Library {
            /// Loads the library, for good.
            ///
            /// # Errors
            /// That it is not there, or too old.
            pub fn load() -> Result<Self> {
                let handle = open()?;
                Ok(Self {
                    $($name: {
                        let address = symbol(handle, $symbol)?;
                        // SAFETY: the function with this name has had this type since its version came (rdma-core's libibverbs.map).
                        unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($argument),*) $(-> $result)?>(address) }
                    },)*
                    $($newer: {
                        // SAFETY: as above; null is none.
                        unsafe {
                            std::mem::transmute::<*mut c_void, Option<unsafe extern "C" fn($($newer_argument),*) $(-> $newer_result)?>>(
                                look_up(handle, $newer_symbol)
                            )
                        }
                    },)*
                })
            }
        }
    };
}

library! {
    get_device_list = c"ibv_get_device_list": fn(*mut c_int) -> *mut *mut ibv_device;
    free_device_list = c"ibv_free_device_list": fn(*mut *mut ibv_device);
    get_device_guid = c"ibv_get_device_guid": fn(*mut ibv_device) -> u64;
    open_device = c"ibv_open_device": fn(*mut ibv_device) -> *mut ibv_context;
    close_device = c"ibv_close_device": fn(*mut ibv_context) -> c_int;
    query_device = c"ibv_query_device": fn(*mut ibv_context, *mut ibv_device_attr) -> c_int;
    query_port = c"ibv_query_port": fn(*mut ibv_context, u8, *mut ibv_port_attr) -> c_int;
    query_gid_table = c"_ibv_query_gid_table": fn(*mut ibv_context, *mut ibv_gid_entry, usize, u32, usize) -> isize;
    query_pkey = c"ibv_query_pkey": fn(*mut ibv_context, u8, c_int, *mut u16) -> c_int;
    alloc_pd = c"ibv_alloc_pd": fn(*mut ibv_context) -> *mut ibv_pd;
    dealloc_pd = c"ibv_dealloc_pd": fn(*mut ibv_pd) -> c_int;
    reg_mr_iova = c"ibv_reg_mr_iova2": fn(*mut ibv_pd, *mut c_void, usize, u64, c_uint) -> *mut ibv_mr;
    dereg_mr = c"ibv_dereg_mr": fn(*mut ibv_mr) -> c_int;
    create_comp_channel = c"ibv_create_comp_channel": fn(*mut ibv_context) -> *mut ibv_comp_channel;
    destroy_comp_channel = c"ibv_destroy_comp_channel": fn(*mut ibv_comp_channel) -> c_int;
    create_cq = c"ibv_create_cq": fn(*mut ibv_context, c_int, *mut c_void, *mut ibv_comp_channel, c_int) -> *mut ibv_cq;
    destroy_cq = c"ibv_destroy_cq": fn(*mut ibv_cq) -> c_int;
    get_cq_event = c"ibv_get_cq_event": fn(*mut ibv_comp_channel, *mut *mut ibv_cq, *mut *mut c_void) -> c_int;
    ack_cq_events = c"ibv_ack_cq_events": fn(*mut ibv_cq, c_uint);
    create_qp = c"ibv_create_qp": fn(*mut ibv_pd, *mut ibv_qp_init_attr) -> *mut ibv_qp;
    modify_qp = c"ibv_modify_qp": fn(*mut ibv_qp, *mut ibv_qp_attr, c_int) -> c_int;
    query_qp = c"ibv_query_qp": fn(*mut ibv_qp, *mut ibv_qp_attr, c_int, *mut ibv_qp_init_attr) -> c_int;
    destroy_qp = c"ibv_destroy_qp": fn(*mut ibv_qp) -> c_int;
    get_async_event = c"ibv_get_async_event": fn(*mut ibv_context, *mut ibv_async_event) -> c_int;
    ack_async_event = c"ibv_ack_async_event": fn(*mut ibv_async_event);
    [newer]
    get_device_index = c"ibv_get_device_index": fn(*mut ibv_device) -> c_int;
    reg_dmabuf_mr = c"ibv_reg_dmabuf_mr": fn(*mut ibv_pd, u64, usize, u64, c_int, c_int) -> *mut ibv_mr;
}

/// The library's file, as programs that are linked against it name it.
const FILE: &CStr = c"libibverbs.so.1";

/// By this libmlx5 leaves received data to the card. Else it copies short messages itself, out of completions to where the receive
/// request says, which is an address of the container's (`mlx5dv_create_qp(3)`, on `MLX5DV_QP_CREATE_DISABLE_SCATTER_TO_CQE`).
pub const LEAVES_DATA_TO_THE_CARD: (&CStr, &CStr) = (c"MLX5_SCATTER_TO_CQE", c"0");

fn open() -> Result<*mut c_void> {
    let (name, value) = LEAVES_DATA_TO_THE_CARD;
    // SAFETY: both end with a zero; nothing of this program looks at its environment but the libraries, when cards are opened and
    // queue pairs made, which is afterwards.
    if unsafe { libc::setenv(name.as_ptr(), value.as_ptr(), 1) } != 0 {
        bail!("cannot set {} in the environment: {}", name.to_string_lossy(), std::io::Error::last_os_error());
    }
    // SAFETY: a name that ends with a zero; what the library does when it is loaded it does in every verbs program.
    let handle = unsafe { libc::dlopen(FILE.as_ptr(), libc::RTLD_NOW) };
    if handle.is_null() {
        bail!("{}; a device of kind ibverbs needs rdma-core (Debian: libibverbs1 and ibverbs-providers)", complaint());
    }
    Ok(handle)
}

/// Null for what the library has not.
pub(crate) fn look_up(handle: *mut c_void, name: &CStr) -> *mut c_void {
    // SAFETY: the handle is open, and the name ends with a zero.
    unsafe { libc::dlsym(handle, name.as_ptr()) }
}

fn symbol(handle: *mut c_void, name: &CStr) -> Result<*mut c_void> {
    let address = look_up(handle, name);
    if address.is_null() {
        bail!("{}: the installed rdma-core is too old; version 33 or later is needed", complaint());
    }
    Ok(address)
}

/// What the dynamic linker says of the last call.
fn complaint() -> String {
    // SAFETY: returns null, or a string that stays until this thread's next call of the kind.
    let said = unsafe { libc::dlerror() };
    if said.is_null() {
        return "libibverbs cannot be loaded".into();
    }
    // SAFETY: as above.
    unsafe { CStr::from_ptr(said) }.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libmlx5_is_told_to_leave_received_data_alone() {
        // With the library or without it.
        let _ = open();
        let (name, value) = LEAVES_DATA_TO_THE_CARD;
        assert_eq!(std::env::var(name.to_str().unwrap()).as_deref(), Ok(value.to_str().unwrap()));
    }
}
