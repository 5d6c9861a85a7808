//! Files of the container's that not every machine can have: of huge pages, and on a disk.

use ringfence_proxy::memory::{Lost, Piece, copy};
use ringfence_proxy::shared::{ForeignFile, Holes, Mapping, PAGE, Run, RunFile, SealedFile};
use ringfence_trials::{huge_pages, skip, tests};
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, fstatfs, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::mm::ProtFlags;
use std::process::ExitCode;

fn main() -> ExitCode {
    ringfence_trials::main(tests![huge_pages_are_mapped_whole, files_on_disk_are_refused])
}

fn huge_pages_are_mapped_whole() {
    let _reserved = huge_pages::reserve(2);
    let fd = match memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB) {
        Ok(fd) => fd,
        Err(error) => skip(format!("files of huge pages are not to be had: {error}")),
    };
    let huge = ForeignFile::inspect(&fd).unwrap().1;
    assert!(huge > PAGE && huge.is_power_of_two());
    ftruncate(&fd, 2 * huge as u64).unwrap();
    let file = ForeignFile::adopt(fd).unwrap();
    let holes = Holes::new().unwrap();
    let foreign = |offset, bytes| Run { file: RunFile::Foreign(&file, &holes), offset, bytes };
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // Part of a page, with the end of another before it: mapping needs no page to be there.
    let mapping = Mapping::of_runs(&[foreign(huge - PAGE, 3 * PAGE)], protection, true).unwrap();
    assert_eq!(mapping.bytes(), 3 * PAGE);
    let piece = Piece::of(&mapping, 0, 3 * PAGE).unwrap();
    assert_eq!(copy(piece, Piece::of_own(&vec![1; 3 * PAGE])), Err(Lost::Target));
    let sealed = SealedFile::create("test", PAGE).unwrap();
    let runs = [Run { file: RunFile::Sealed(&sealed), offset: 0, bytes: PAGE }, foreign(0, PAGE)];
    assert_eq!(Mapping::of_runs(&runs, ProtFlags::READ, false).unwrap_err(), Errno::OPNOTSUPP);
    if let Err(error) = fallocate(&file, FallocateFlags::empty(), 0, 2 * huge as u64) {
        skip(format!("this machine has no two huge pages: {error}"));
    }
    copy(piece, Piece::of_own(&vec![3; 3 * PAGE])).unwrap();
    let mut bytes = vec![0; 3 * PAGE];
    copy(Piece::of_own_mut(&mut bytes), piece).unwrap();
    assert_eq!(bytes, vec![3; 3 * PAGE]);
}

fn files_on_disk_are_refused() {
    const TMPFS_MAGIC: u64 = 0x0102_1994;
    let file = tempfile::tempfile_in("/var/tmp").unwrap();
    if fstatfs(&file).unwrap().f_type as u64 == TMPFS_MAGIC {
        skip("/var/tmp is memory");
    }
    assert_eq!(ForeignFile::adopt(file.into()).unwrap_err().1, Errno::INVAL);
}
