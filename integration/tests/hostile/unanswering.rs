//! A file whose file system is a program that answers nothing: who asks it, or closes its file, waits.

use anyhow::{Context, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

/// The file. Dropped, it answers all who wait with errors.
pub struct Unanswering {
    device: Option<File>,
    /// Open.
    file: Option<OwnedFd>,
    place: PathBuf,
}

impl Unanswering {
    /// One, if the machine has FUSE.
    pub fn new() -> Result<Option<Self>> {
        let Ok(device) = OpenOptions::new().read(true).write(true).open("/dev/fuse") else { return Ok(None) };
        let place = std::env::temp_dir().join(format!("ringfence-unanswering-{}", std::process::id()));
        std::fs::create_dir(&place)?;
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
        let mounted = mount(Some("ringfence"), &place, Some("fuse"), MsFlags::MS_NOSUID, Some(options.as_str()));
        if mounted.is_err() {
            std::fs::remove_dir(&place)?;
            return Ok(None);
        }
        let mut this = Self { device: None, file: None, place };
        // Until the file is open it is served.
        let server = std::thread::spawn(move || serve(device));
        let opened = OpenOptions::new().read(true).write(true).open(this.place.join("file"));
        this.device = Some(server.join().ok().context("the file system's thread")??);
        this.file = Some(opened.context("a file of our own file system")?.into());
        Ok(Some(this))
    }

    /// The file once more.
    pub fn fd(&self) -> Result<OwnedFd> {
        Ok(self.file.as_ref().context("it is open")?.try_clone()?)
    }
}

impl Drop for Unanswering {
    fn drop(&mut self) {
        // With this ends all waiting; only then may the file be closed.
        self.device = None;
        self.file = None;
        let _ = umount2(&self.place, MntFlags::MNT_DETACH);
        let _ = std::fs::remove_dir(&self.place);
    }
}

// Requests of `linux/fuse.h`.
const LOOKUP: u32 = 1;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const INIT: u32 = 26;

/// `struct fuse_attr` of a file or of the directory that it is in.
fn attributes(node: u64) -> Vec<u8> {
    let mode: u32 = if node == 1 { 0o040_755 } else { 0o100_666 };
    let mut attributes = vec![0; 88];
    attributes[..8].copy_from_slice(&node.to_ne_bytes());
    attributes[8..16].copy_from_slice(&(1u64 << 20).to_ne_bytes());
    attributes[60..64].copy_from_slice(&mode.to_ne_bytes());
    attributes[64..68].copy_from_slice(&1u32.to_ne_bytes());
    attributes
}

/// Answers until the file is open.
fn serve(mut device: File) -> Result<File> {
    loop {
        let mut request = vec![0; 1 << 17];
        let length = device.read(&mut request)?;
        ensure!(length >= 40, "a request of {length} bytes");
        let word = |at: usize| u32::from_ne_bytes([request[at], request[at + 1], request[at + 2], request[at + 3]]);
        let operation = word(4);
        let body = match operation {
            INIT => {
                let mut body = vec![0; 64];
                body[..4].copy_from_slice(&7u32.to_ne_bytes());
                body[4..8].copy_from_slice(&31u32.to_ne_bytes());
                body[20..24].copy_from_slice(&4096u32.to_ne_bytes());
                Ok(body)
            }
            // Node 2, and nothing of what is said of it holds for any time.
            LOOKUP => Ok([&2u64.to_ne_bytes()[..], &[0; 32], &attributes(2)].concat()),
            GETATTR => Ok([&[0; 16][..], &attributes(u64::from(word(16)))].concat()),
            OPEN => Ok(vec![0; 16]),
            _ => Err(nix::errno::Errno::ENOSYS),
        };
        let (error, body) = body.map_or_else(|errno| (-(errno as i32), Vec::new()), |body| (0, body));
        let length = (16 + body.len()) as u32;
        device.write_all(&[&length.to_ne_bytes()[..], &error.to_ne_bytes(), &request[8..16], &body].concat())?;
        if operation == OPEN {
            return Ok(device);
        }
    }
}
