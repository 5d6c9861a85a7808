//! A real card's context, and what is made in it.

// UNSAFETY: everything here is a call of libibverbs with pointers that this module got from it, and keeps.
#![allow(unsafe_code)]

mod extended;
mod mlx5;
mod objects;

pub use objects::{CardQp, Cq, Mr, Pd};

use crate::library::Library;
use anyhow::{Context as _, Result, bail, ensure};
use objects::Made;
use ringfence_abi::*;
use ringfence_protocol::control::NO_INDEX;
use ringfence_protocol::verbs::EventType;
use ringfence_proxy::errors::numbered;
use ringfence_proxy::sysfs::guid as guid_text;
use rustix::fd::{BorrowedFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::ffi::{CStr, c_int};
use std::mem::zeroed;
use std::num::NonZeroU8;
use std::path::PathBuf;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// What a call that returns an errno says.
fn done(errno: c_int) -> Result<(), Errno> {
    // Some say -1 and leave it in `errno`, and some providers say it with the kernel's sign.
    match errno {
        0 => Ok(()),
        -1 => Err(last()),
        errno => Err(numbered(errno.saturating_abs())),
    }
}

/// What a call that returns a pointer says.
fn made<T>(pointer: *mut T) -> Result<NonNull<T>, Errno> {
    NonNull::new(pointer).ok_or_else(last)
}

fn last() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error())
        .filter(|errno| errno.raw_os_error() != 0)
        .unwrap_or(Errno::IO)
}

/// An open card.
#[derive(Debug)]
pub struct Card {
    library: Arc<Library>,
    context: NonNull<ibv_context>,
    channel: NonNull<ibv_comp_channel>,
    /// What is known of it without asking it.
    pub about: About,
    /// That of its ports which is used.
    port: NonZeroU8,
    /// What has been made in it and is not destroyed.
    made: Mutex<Made>,
    closed: AtomicBool,
    /// What mlx5's library has besides, if the card is one of its; looked up when it is needed.
    mlx5: OnceLock<Option<mlx5::Functions>>,
    /// A file of its kernel device's directory, which can be read as long as that is not being removed.
    sign: Option<OwnedFd>,
}

/// What the library's list of cards says of one.
#[derive(Clone, Debug)]
pub struct About {
    /// Its name.
    pub name: String,
    /// In network order.
    pub guid: u64,
    /// `enum ibv_node_type`.
    pub node_type: u32,
    /// `enum ibv_transport_type`.
    pub transport: u32,
    /// The kernel's number of it; [`NO_INDEX`] if libibverbs does not know.
    pub index: u32,
    /// Its directory in `/sys/class/infiniband`.
    pub sysfs: PathBuf,
    /// Its character device, if there is one.
    pub node: Option<PathBuf>,
    /// What that is in `/sys`.
    pub device: PathBuf,
}

impl About {
    /// The kernel's driver of the device that it is on.
    #[must_use]
    pub fn driver(&self) -> Option<String> {
        let driver = std::fs::read_link(self.sysfs.join("device/driver")).ok()?;
        Some(driver.file_name()?.to_str()?.to_owned())
    }
}

// SAFETY: libibverbs may be called by several threads at once (verbs of one object are locked or ordered by it); what the fields say
// does not change.
unsafe impl Send for Card {}
// SAFETY: as above.
unsafe impl Sync for Card {}

impl Card {
    /// Opens the card with this name, to use this port of it.
    ///
    /// # Errors
    /// With what to do.
    pub fn open(name: &str, port: NonZeroU8) -> Result<Self> {
        let library = Arc::new(Library::load()?);
        let (context, about) = Self::listed(&library, |devices| Self::open_of(&library, devices, name))?;
        let card = Self::of(library, context, about, port)?;
        let ports = card.attributes().with_context(|| format!("cannot query RDMA device {name}"))?.phys_port_cnt;
        ensure!(
            port.get() <= ports,
            "RDMA device {name} has no port {port}: its last is {ports}; correct port of the [[device]] (`rdma link` lists them)"
        );
        Ok(card)
    }

    /// Opens the card that has this one's GUID now, whatever its name: this one is gone and may be back. `None` if it is not. Of several,
    /// the one that has its name: some virtual functions have no GUID, and an interface's VLANs may have one with it.
    ///
    /// # Errors
    /// As [`Self::open`], and that its name is another card's now: rxe's GUID is made of its interface's address, a virtual function's is the
    /// administrator's.
    pub fn find_again(&self) -> Result<Option<Self>> {
        let library = &self.library;
        let opened = Self::listed(library, |devices| {
            let names = devices.iter().filter(|device| self.is(**device)).map(|device| {
                // SAFETY: the devices of a list are there until it is freed, and their names end with a zero.
                unsafe { CStr::from_ptr((**device).name.as_ptr()) }.to_string_lossy().into_owned()
            });
            let names: Vec<String> = names.collect();
            match names.iter().find(|name| **name == self.about.name).or(names.first()) {
                Some(name) => Self::open_of(library, devices, name).map(Some),
                None => self.is_none_of(devices).map(|()| None),
            }
        })?;
        opened.map(|(context, about)| Self::of(Arc::clone(library), context, about, self.port)).transpose()
    }

    /// Whether this very card is still there, open or not: one that comes back, with the same GUID and the same name, is another to the
    /// kernel. Where that cannot be told, one with its GUID is taken for it.
    #[must_use]
    pub fn has_stayed(&self) -> bool {
        if self.sign.is_some() {
            return !self.is_leaving();
        }
        Self::listed(&self.library, |devices| Ok(devices.iter().any(|device| self.is(*device)))).unwrap_or(true)
    }

    /// Whether a device of a list that has not been freed is this card: by its GUID, or by its name where that says nothing.
    fn is(&self, device: *mut ibv_device) -> bool {
        // SAFETY: the devices of a list are there until it is freed, and their names end with a zero.
        let (guid, name) = unsafe {
            ((self.library.get_device_guid)(device), CStr::from_ptr((*device).name.as_ptr()).to_string_lossy())
        };
        guid == self.about.guid && (guid != 0 || name == self.about.name)
    }

    /// That none of them has this one's name, though none is this one.
    fn is_none_of(&self, devices: &[*mut ibv_device]) -> Result<()> {
        for device in devices {
            // SAFETY: the devices of a list are there until it is freed, and their names end with a zero.
            let (guid, name) =
                unsafe { ((self.library.get_device_guid)(*device), CStr::from_ptr((**device).name.as_ptr())) };
            ensure!(
                name.to_string_lossy() != self.about.name,
                "the card of this name has GUID {}, and it had {}: start the container again if it is to have that one",
                guid_text(guid).trim_end(),
                guid_text(self.about.guid).trim_end(),
            );
        }
        Ok(())
    }

    /// What `pick` finds in the list of all cards.
    fn listed<R>(library: &Library, pick: impl FnOnce(&[*mut ibv_device]) -> Result<R>) -> Result<R> {
        let mut count = 0;
        // SAFETY: `count` lives across the call.
        let list = made(unsafe { (library.get_device_list)(&raw mut count) })
            .context("cannot list the RDMA devices; is the kernel's module ib_uverbs loaded?")?;
        // SAFETY: the library returned an array of so many pointers.
        let devices = unsafe { std::slice::from_raw_parts(list.as_ptr(), count.max(0) as usize) };
        let picked = pick(devices);
        // SAFETY: the list is of this library, and freed once; an open device stays.
        unsafe { (library.free_device_list)(list.as_ptr()) };
        picked
    }

    /// Opens it once more.
    ///
    /// Some providers, rxe's and siw's among them, ring their doorbell by `write(2)`, which the kernel refuses to everybody but those
    /// whose credentials are the very ones with which the descriptor was opened (`ib_safe_file_access`). So a card is opened
    /// once to know what it is, as root, and again as the user who is to use it.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn reopen(&self) -> Result<Self> {
        // SAFETY: a device is there as long as a context of it.
        let device = unsafe { (*self.context.as_ptr()).device };
        let name = &self.about.name;
        // SAFETY: as above.
        let context = made(unsafe { (self.library.open_device)(device) })
            .with_context(|| format!("cannot open RDMA device {name} as the user that the proxy is"))?;
        Self::of(Arc::clone(&self.library), context, self.about.clone(), self.port)
    }

    /// A context that was opened.
    pub(crate) fn of(
        library: Arc<Library>,
        context: NonNull<ibv_context>,
        about: About,
        port: NonZeroU8,
    ) -> Result<Self> {
        // SAFETY: the context is open.
        let channel = match made(unsafe { (library.create_comp_channel)(context.as_ptr()) }) {
            Ok(channel) => channel,
            Err(error) => {
                // SAFETY: open, and nothing has been made in it.
                unsafe { (library.close_device)(context.as_ptr()) };
                return Err(error)
                    .with_context(|| format!("cannot make a completion channel of RDMA device {}", about.name));
            }
        };
        let sign = rustix::fs::open(about.device.join("dev"), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok();
        let made = Mutex::default();
        let (closed, mlx5) = (AtomicBool::new(false), OnceLock::new());
        let card = Self { library, context, channel, about, port, made, closed, mlx5, sign };
        for fd in [card.completions(), card.events()].into_iter().flatten() {
            let flags = rustix::fs::fcntl_getfl(fd)?;
            rustix::fs::fcntl_setfl(fd, flags | rustix::fs::OFlags::NONBLOCK)?;
        }
        Ok(card)
    }

    fn open_of(library: &Library, devices: &[*mut ibv_device], name: &str) -> Result<(NonNull<ibv_context>, About)> {
        let names = devices.iter().map(|device| {
            // SAFETY: the devices of a list are there until it is freed, and their names end with a zero.
            let name = unsafe { CStr::from_ptr((**device).name.as_ptr()) };
            name.to_string_lossy().into_owned()
        });
        let names: Vec<String> = names.collect();
        let Some(index) = names.iter().position(|other| other == name) else {
            let others =
                if names.is_empty() { "none; is its driver's module loaded?".into() } else { names.join(", ") };
            bail!("no RDMA device has the name {name}: there is {others}");
        };
        let device = devices[index];
        // SAFETY: as above.
        let node = unsafe { CStr::from_ptr((*device).dev_name.as_ptr()) };
        let node = PathBuf::from("/dev/infiniband").join(node.to_string_lossy().as_ref());
        // SAFETY: as above.
        let about = unsafe {
            About {
                name: name.to_owned(),
                guid: (library.get_device_guid)(device),
                node_type: (*device).node_type as u32,
                transport: (*device).transport_type as u32,
                // -1 where the kernel was not asked by netlink.
                index: library.get_device_index.map_or(NO_INDEX, |index| index(device).cast_unsigned()),
                sysfs: CStr::from_ptr((*device).ibdev_path.as_ptr()).to_string_lossy().into_owned().into(),
                node: Some(node).filter(|node| node.exists()),
                device: CStr::from_ptr((*device).dev_path.as_ptr()).to_string_lossy().into_owned().into(),
            }
        };
        // SAFETY: as above.
        let context = made(unsafe { (library.open_device)(device) }).map_err(|error| match error {
            Errno::PERM | Errno::ACCESS => anyhow::anyhow!(
                "cannot open RDMA device {name}: {error}; with `rdma system` in netns mode exclusive it must be in the container's \
                 network namespace"
            ),
            error => anyhow::anyhow!("cannot open RDMA device {name}: {error}"),
        })?;
        Ok((context, about))
    }

    /// `EIO` if it has been closed.
    pub fn check(&self) -> Result<(), Errno> {
        if self.closed.load(Ordering::Relaxed) { Err(Errno::IO) } else { Ok(()) }
    }

    /// Whether the kernel is removing it. Of a driver that can take its device away from those who have it open an event says so;
    /// others wait until it has been closed by all.
    #[must_use]
    pub fn is_leaving(&self) -> bool {
        let read = self.sign.as_ref().map(|sign| rustix::io::pread(sign, &mut [0; 16], 0));
        read.is_some_and(|read| read == Err(Errno::NODEV))
    }

    /// Destroys all that has been made in it, and closes it. Whatever stands for that fails from now on.
    ///
    /// # Safety
    /// Nobody calls anything of it, or of what has been made in it, meanwhile.
    pub unsafe fn close(&self) {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if self.closed.swap(true, Ordering::Relaxed) {
            return;
        }
        // SAFETY: all of it is there, and in use by nobody, as the caller promises; from now on nobody destroys it again.
        unsafe {
            made.destroy(&self.library, self.mlx5.get().and_then(Option::as_ref));
            (self.library.destroy_comp_channel)(self.channel.as_ptr());
            (self.library.close_device)(self.context.as_ptr());
        }
    }

    /// `struct ibv_device_attr`.
    pub fn attributes(&self) -> Result<ibv_device_attr, Errno> {
        self.check()?;
        // SAFETY: plain data; the call fills it.
        let mut attr = unsafe { zeroed() };
        // SAFETY: the context is open, and `attr` lives across the call.
        done(unsafe { (self.library.query_device)(self.context.as_ptr(), &raw mut attr) })?;
        Ok(attr)
    }

    /// The number of its port that is used.
    #[must_use]
    pub fn port_number(&self) -> u8 {
        self.port.get()
    }

    /// `struct ibv_port_attr`, of the port that is used.
    pub fn port(&self) -> Result<ibv_port_attr, Errno> {
        self.check()?;
        // SAFETY: plain data; the call fills it, or as much of it as it knows.
        let mut attr = unsafe { zeroed() };
        // SAFETY: the context is open, and `attr` lives across the call.
        done(unsafe { (self.library.query_port)(self.context.as_ptr(), self.port.get(), &raw mut attr) })?;
        Ok(attr)
    }

    /// The table of P_Keys of the port that is used; zero for an empty entry.
    ///
    /// # Errors
    /// What the card says.
    pub fn pkeys(&self) -> Result<Vec<u16>, Errno> {
        let entries = self.port()?.pkey_tbl_len;
        let entry = |index| {
            let mut key = 0;
            // SAFETY: the context is open, and `key` lives across the call.
            let said = unsafe {
                (self.library.query_pkey)(self.context.as_ptr(), self.port.get(), c_int::from(index), &raw mut key)
            };
            done(said).map(|()| u16::from_be(key))
        };
        (0..entries).map(entry).collect()
    }

    /// The entries of all ports' GID tables that are not empty.
    ///
    /// # Errors
    /// What the card says.
    pub fn gids(&self) -> Result<Vec<ibv_gid_entry>, Errno> {
        const MOST: usize = 1024;
        self.check()?;
        // SAFETY: plain data.
        let mut entries = vec![unsafe { zeroed::<ibv_gid_entry>() }; MOST];
        let size = size_of::<ibv_gid_entry>();
        // SAFETY: the context is open, and there is room for as many entries of that size.
        let count =
            unsafe { (self.library.query_gid_table)(self.context.as_ptr(), entries.as_mut_ptr(), MOST, 0, size) };
        // What is negative is an error's number.
        let failed = |_| numbered(i32::try_from(-count).unwrap_or(0));
        entries.truncate(usize::try_from(count).map_err(failed)?);
        Ok(entries)
    }

    /// Readable when a queue that was armed has a completion.
    #[must_use]
    pub fn completions(&self) -> Option<BorrowedFd<'_>> {
        self.check().ok()?;
        // SAFETY: open as long as the channel, which `self` has.
        Some(unsafe { BorrowedFd::borrow_raw((*self.channel.as_ptr()).fd) })
    }

    /// Readable when there is an asynchronous event.
    #[must_use]
    pub fn events(&self) -> Option<BorrowedFd<'_>> {
        self.check().ok()?;
        // SAFETY: open as long as the context, which `self` has.
        Some(unsafe { BorrowedFd::borrow_raw((*self.context.as_ptr()).async_fd) })
    }

    /// The next of the queues that were armed and have a completion: its context. `None` if there is none now.
    #[must_use]
    pub fn completion_event(&self) -> Option<usize> {
        self.check().ok()?;
        let (mut cq, mut context) = (null_mut(), null_mut());
        // SAFETY: the channel is there; the descriptor does not block.
        let result = unsafe { (self.library.get_cq_event)(self.channel.as_ptr(), &raw mut cq, &raw mut context) };
        if result != 0 {
            return None;
        }
        // SAFETY: the queue that the event is of, once. It is there: destroying a queue waits until its events are acknowledged.
        unsafe { (self.library.ack_cq_events)(cq, 1) };
        Some(context.addr())
    }

    /// The next asynchronous event, if there is one now.
    ///
    /// # Errors
    /// `EIO` if the card is gone.
    pub fn event(&self) -> Result<Option<Event>, Errno> {
        self.check()?;
        let mut event = ibv_async_event { element: null_mut(), event_type: 0 };
        // SAFETY: the context is open, and its descriptor does not block.
        if unsafe { (self.library.get_async_event)(self.context.as_ptr(), &raw mut event) } != 0 {
            return match last() {
                Errno::AGAIN | Errno::INTR => Ok(None),
                // What a descriptor says whose device has been taken away, or nothing.
                _ => Err(Errno::IO),
            };
        }
        let kind = EventType(event.event_type);
        let of = match kind {
            kind if kind.is_of_qp() && !event.element.is_null() => {
                // SAFETY: a queue pair is not destroyed before its events are acknowledged.
                Of::Qp(unsafe { (*event.element.cast::<ibv_qp>()).qp_num })
            }
            // `int port_num` in the same place.
            kind if kind.is_of_port() => Of::Port(event.element.addr() as u32),
            _ => Of::Card,
        };
        // SAFETY: got above, and acknowledged once.
        unsafe { (self.library.ack_async_event)(&raw mut event) };
        Ok(Some(Event { kind, of }))
    }

    /// Its operations; none when it has been closed.
    #[inline]
    fn ops(&self) -> Option<&ibv_context_ops> {
        self.check().ok()?;
        // SAFETY: the context is open, and its operations are set when it is opened.
        Some(unsafe { &(*self.context.as_ptr()).ops })
    }
}

/// An asynchronous event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// What happened.
    pub kind: EventType,
    /// To what.
    pub of: Of,
}

/// What an event is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Of {
    /// The queue pair with this number.
    Qp(u32),
    /// The port with this number.
    Port(u32),
    /// The card, or something that the proxy has none of.
    Card,
}

impl Drop for Card {
    fn drop(&mut self) {
        // SAFETY: whatever was made in it had the card, and is gone.
        unsafe { self.close() };
    }
}
