//! Where the library goes, so that programs of all kinds find it and nobody else notices.
//!
//! | in the container | for |
//! |---|---|
//! | `/etc/ld.so.ringfence` | the library itself, beside `ld.so.preload` |
//! | `/etc/ld.so.preload` | every program by glibc, whatever the libibverbs is called that it brings |
//! | the image's own `libibverbs.so.1` | who opens it by its path or another name: it is the same file then, so that there is one copy |
//! | `/etc/ld-musl-x86_64.path` | programs by musl, which preloads nothing |

use super::{Injection, MakeError, Proxied, clone};
use crate::elf::{self, Offers};
use crate::failure::{Code, During, Failure};
use crate::image::{self, Library, MAX_LIBRARY};
use crate::mountinfo::descriptor_path;
use crate::nothing;
use crate::overlay::Overlay;
use crate::preload_file::{self, DIRECTORY, MAX_BYTES, PLATFORMS, PLATFORMS_I386};
use crate::rdma_cm;
use crate::rootfs::{Error, Kind, Place};
use crate::session::{self, LIBRARY};
use crate::sys;
use rustix::fs::{Mode, OFlags};
use rustix::mount::MoveMountFlags;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;

const PRELOAD: &str = "ld.so.preload";
const MUSL_PATH: &str = "ld-musl-x86_64.path";
/// The object for i386, beside the library.
const NOTHING: &str = "nothing.i386";

/// What our library is to those of the image.
struct Comparison<'a> {
    /// Whether ours has the name libibverbs.so.1. Without it, who depends on that name gets the image's library, so that his
    /// program starts also if it needs more than ours has; the verbs that he calls are ours in any case.
    has_name: bool,
    /// Those that ours can stand for.
    replaced: Vec<&'a Place>,
    warnings: Vec<String>,
}

impl Injection<'_> {
    /// Attaches all that a proxied container gets. `more` are directories in which its programs look for libraries.
    pub(super) fn proxied(&mut self, sources: Proxied, more: &[String]) -> Result<Vec<String>, Failure> {
        let etc = self.directory(None, "etc")?;
        let theirs = image::libraries(&self.root, more);
        let Comparison { has_name, replaced, mut warnings } = compare(&sources, &theirs)?;
        let mut files = vec![self.preload(&etc, &sources)?];
        if has_name {
            files.extend(self.musl(&etc, &mut warnings));
        }
        for (name, content) in &files {
            let file = session::create(&sources.directory.1, name, 0o644);
            let written = file.and_then(|mut file| file.write_all(content));
            written.during(Code::Injection, || format!("cannot write the merged {name}"))?;
        }

        let dev = self.dev()?;
        let socket = self.directory(Some(&dev), &sources.socket.1)?;
        let names: Vec<_> = files.iter().map(|(name, _)| *name).collect();
        let (directory, places) = self.places(&etc, &names, &socket)?;
        self.attach(&directory, &sources.directory.0)?;
        let path = || format!("/etc/{DIRECTORY}/{LIBRARY} in the container");
        if has_name {
            let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
            let target = below(&sources.directory.0, LIBRARY).during(Code::Injection, path)?;
            rustix::mount::move_mount(&sources.library, "", target, "", flags).during(Code::Injection, path)?;
        }
        let library = below(&sources.directory.0, LIBRARY).during(Code::Injection, path)?;
        for (place, name) in places.iter().zip(names) {
            let file = below(&sources.directory.0, name).and_then(|file| clone(file, sys::NO_EXEC));
            self.attach(place, &file.during(Code::Injection, || format!("/etc/{name} in the container"))?)?;
        }
        for place in replaced {
            let attached = clone(&library, 0).map_err(|error| error.to_string());
            let attached = attached.and_then(|tree| self.attach(place, &tree).map_err(|failure| failure.message));
            warnings.extend(attached.err().map(|why| left_alone(place, &why)));
        }
        let rdma_cm = sources.rdma_cm.as_ref();
        match (&sources.shown, rdma_cm) {
            (Some(shown), _) => warnings.extend(self.sysfs(&dev, &socket, shown, rdma_cm)?),
            (None, Some(node)) => {
                let directory = self.directory(Some(&dev), "infiniband")?;
                self.node(&directory, rdma_cm::NAME, node)?;
            }
            (None, None) => {}
        }
        self.attach(&socket, &sources.socket.0)?;
        if let Some(node) = &sources.userfaultfd {
            self.node(&dev, "userfaultfd", node)?;
        }
        Ok(warnings)
    }

    /// `ld.so.preload`, and what its line needs.
    fn preload(&self, etc: &Place, sources: &Proxied) -> Result<(&'static str, Vec<u8>), Failure> {
        let image = match etc.find(PRELOAD, Kind::File)? {
            Some(place) => read_small(&place)?,
            None => Vec::new(),
        };
        let has_i386 = image::has_i386(&self.root);
        if has_i386 {
            platforms(&sources.directory.1)
                .during(Code::Injection, || "cannot prepare the library for i386 programs".into())?;
        }
        Ok((PRELOAD, preload_file::merge(&preload_file::line(has_i386), &image)))
    }

    /// musl's search path, if there is musl, with our directory in front.
    fn musl(&self, etc: &Place, warnings: &mut Vec<String>) -> Option<(&'static str, Vec<u8>)> {
        let default = image::musl_search_path(&self.root)?;
        let image = match etc.find(MUSL_PATH, Kind::File) {
            Ok(Some(place)) => read_small(&place).map_err(|failure| failure.message),
            Ok(None) => {
                default.map(<[u8]>::to_vec).map_err(|why| format!("/lib/ld-musl-x86_64.so.1 in the image: {why}"))
            }
            Err(error) => Err(error.to_string()),
        };
        match image {
            Ok(image) => Some((MUSL_PATH, preload_file::merge(&format!("/etc/{DIRECTORY}"), &image))),
            Err(why) => {
                warnings.push(format!("programs by musl see no device: {why}"));
                None
            }
        }
    }

    /// Our directory in `etc`, and the files `names`: made there, or else laid over it.
    fn places(&mut self, etc: &Place, names: &[&str], scratch: &Place) -> Result<(Place, Vec<Place>), Failure> {
        // A volume's owner did not ask for more files in it.
        if etc.mount == self.root.mount {
            match self.directory(Some(etc), DIRECTORY) {
                Ok(directory) => {
                    let files = names.iter().map(|name| self.file(etc, name)).collect::<Result<_, _>>();
                    return Ok((directory, files?));
                }
                Err(MakeError::Place(error)) if error.is_read_only() => {}
                Err(error) => return Err(error.into()),
            }
        }
        let mut missing = vec![(DIRECTORY, Kind::Directory)];
        missing.extend(names.iter().map(|name| (*name, Kind::File)));
        let mut absent = Vec::new();
        for (name, kind) in missing {
            if etc.find(name, kind)?.is_none() {
                absent.push((name, kind));
            }
        }
        let what = || "cannot lay ld.so.preload over the read-only /etc of the container".into();
        // A volume may be there, and the upper layer is mounted upon it for a moment.
        self.refuse_shared(scratch)?;
        let overlay = Overlay::new(etc, &absent, scratch).during(Code::Injection, what)?;
        self.attach(etc, overlay.mount())?;
        overlay.restore_below().during(Code::Injection, what)?;
        let etc = self.directory(None, "etc")?;
        let directory = self.directory(Some(&etc), DIRECTORY)?;
        let files = names.iter().map(|name| self.file(&etc, name)).collect::<Result<_, _>>();
        Ok((directory, files?))
    }

    /// The node `name`; over one that the runtime made, whose mode may be another.
    fn node(&mut self, directory: &Place, name: &str, node: &OwnedFd) -> Result<(), Failure> {
        let place = match self.file(directory, name) {
            Err(MakeError::Place(Error::WrongType { .. })) => directory.find(name, Kind::Device)?,
            result => Some(result?),
        };
        place.map_or(Ok(()), |place| self.attach(&place, node))
    }
}

fn compare<'a>(sources: &Proxied, theirs: &'a [Library]) -> Result<Comparison<'a>, Failure> {
    let mut comparison = Comparison { has_name: true, replaced: Vec::new(), warnings: Vec::new() };
    if theirs.is_empty() {
        return Ok(comparison);
    }
    let what = || "the preload library (inject.library)".to_owned();
    let mut bytes = Vec::new();
    let file = File::open(descriptor_path(&sources.library));
    file.and_then(|file| file.take(MAX_LIBRARY as u64).read_to_end(&mut bytes)).during(Code::Injection, what)?;
    let ours = Offers::of(&bytes).map(|offers| offers.symbols).unwrap_or_default();
    for Library { place, offers } in theirs {
        let mut beyond = offers.symbols.difference(&ours);
        match beyond.next() {
            None => comparison.replaced.push(place),
            Some(first) => {
                let why = format!("it has {} symbols that ours has not, such as {first}", beyond.count() + 1);
                comparison.warnings.push(left_alone(place, &why));
            }
        }
    }
    if !comparison.warnings.is_empty() && elf::take_name(&mut bytes).is_some() {
        comparison.has_name = false;
        let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&sources.directory.1, LIBRARY, flags, Mode::empty()).map_err(io::Error::from);
        let written = file.and_then(|file| File::from(file).write_all(&bytes));
        written.during(Code::Injection, || "cannot write the library without its name".into())?;
    }
    Ok(comparison)
}

fn left_alone(place: &Place, why: &str) -> String {
    format!("/{} in the image is left alone, and who opens it by a path or by dlopen sees no device: {why}", place.path)
}

/// Has `$PLATFORM` in our line lead programs for x86-64 to the library, and those for i386 to nothing.
fn platforms(directory: &OwnedFd) -> io::Result<()> {
    session::create(directory, NOTHING, 0o644)?.write_all(&nothing::i386())?;
    for (platforms, target) in [(&PLATFORMS[..], LIBRARY), (&PLATFORMS_I386, NOTHING)] {
        for platform in platforms {
            rustix::fs::mkdirat(directory, *platform, Mode::from_raw_mode(0o755))?;
            let link = format!("{platform}/{}", preload_file::NAME);
            rustix::fs::symlinkat(format!("../{target}"), directory, link)?;
        }
    }
    Ok(())
}

/// Opens what is called `name` in the mount `directory`; not by the container's path to it.
fn below(directory: &OwnedFd, name: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(directory, name, flags, Mode::empty())?)
}

/// A file of the image that is taken over.
fn read_small(place: &Place) -> Result<Vec<u8>, Failure> {
    place.read(MAX_BYTES).during(Code::Injection, || format!("/{} in the container", place.path))
}
