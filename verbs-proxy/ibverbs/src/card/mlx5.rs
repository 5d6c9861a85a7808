//! The scheduling tree of mlx5's own library (`infiniband/mlx5dv.h`), where the card is one of its.

// UNSAFETY: calls C functions through pointers that were looked up by name, with pointers that they gave.
#![allow(unsafe_code)]

use super::{Card, CardQp, done, made};
use crate::help::{Elements, Probed};
use crate::library::look_up;
use ringfence_abi::{ibv_context, ibv_device, ibv_qp};
use rustix::io::Errno;
use std::ffi::{CStr, c_int, c_void};
use std::num::NonZeroU32;
use std::ptr::{NonNull, null_mut};
use std::sync::PoisonError;

/// `struct mlx5dv_sched_node`, of which there are only pointers.
pub(super) enum SchedNode {}
/// `struct mlx5dv_sched_leaf`.
pub(super) enum SchedLeaf {}

/// `struct mlx5dv_sched_attr`.
#[repr(C)]
struct SchedAttr {
    parent: *mut SchedNode,
    /// What of the following counts.
    flags: u32,
    /// In relation to other children of the parent.
    bw_share: u32,
    /// Mbit/s.
    max_avg_bw: u32,
    /// 0.
    comp_mask: u64,
}

/// `MLX5DV_SCHED_ELEM_ATTR_FLAGS_MAX_AVG_BW`.
const MAX_AVG_BW: u32 = 1 << 1;

/// A node of the card's tree.
#[derive(Clone, Copy, Debug)]
pub struct Node(NonNull<SchedNode>);
/// A leaf.
#[derive(Clone, Copy, Debug)]
pub struct Leaf(NonNull<SchedLeaf>);

// SAFETY: a name of something of the library's, which any thread may use that may use its card.
unsafe impl Send for Node {}
// SAFETY: as above.
unsafe impl Send for Leaf {}

/// The library's name, which is in its file, and by which the dynamic linker knows it wherever it was loaded from.
const NAME: &CStr = c"libmlx5.so.1";

macro_rules! functions {
    ($($name:ident = $symbol:literal: fn($($argument:ty),*) -> $result:ty;)*) => {
        /// The library's functions that are called here; there since rdma-core 33.
        #[derive(Clone, Copy, Debug)]
        pub(super) struct Functions {
            $($name: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        /// Names and types, as the header has them.
        #[cfg(test)]
        const SYMBOLS: &[&CStr] = &[$($symbol),*];

        impl Functions {
            /// `None` if one of them is missing.
            fn find(handle: *mut c_void) -> Option<Self> {
                Some(Self {
                    $($name: {
                        let address = NonNull::new(look_up(handle, $symbol))?.as_ptr();
                        // SAFETY: the function with this name has had this type since it came (rdma-core's libmlx5.map and
                        // mlx5dv.h, with which a test compares it).
                        unsafe {
                            std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($argument),*) -> $result>(address)
                        }
                    },)*
                })
            }
        }
    };
}

functions! {
    is_supported = c"mlx5dv_is_supported": fn(*mut ibv_device) -> bool;
    node_create = c"mlx5dv_sched_node_create": fn(*mut ibv_context, *const SchedAttr) -> *mut SchedNode;
    leaf_create = c"mlx5dv_sched_leaf_create": fn(*mut ibv_context, *const SchedAttr) -> *mut SchedLeaf;
    node_destroy = c"mlx5dv_sched_node_destroy": fn(*mut SchedNode) -> c_int;
    leaf_destroy = c"mlx5dv_sched_leaf_destroy": fn(*mut SchedLeaf) -> c_int;
    modify_qp = c"mlx5dv_modify_qp_sched_elem": fn(*mut ibv_qp, *const SchedLeaf, *const SchedLeaf) -> c_int;
}

impl Functions {
    /// Of the library that libibverbs loaded as the card's provider. It is not loaded here: under the sandbox it could not be, and a
    /// card without it is not its.
    fn loaded() -> Option<Self> {
        // SAFETY: the name ends with a zero, and nothing is loaded.
        let handle = unsafe { libc::dlopen(NAME.as_ptr(), libc::RTLD_NOW | libc::RTLD_NOLOAD) };
        if handle.is_null() { None } else { Self::find(handle) }
    }

    /// Children before their parents. What hangs on them must be gone.
    ///
    /// # Safety
    /// The elements' card is open.
    pub(super) unsafe fn destroy(&self, elements: &mut Elements<Node, Leaf>) {
        // SAFETY: made by this library, and taken out of the list when they are destroyed.
        elements.destroy(
            |leaf| done(unsafe { (self.leaf_destroy)(leaf.0.as_ptr()) }),
            |node| done(unsafe { (self.node_destroy)(node.0.as_ptr()) }),
        );
    }
}

/// Whether the kernel's driver of a card is mlx5's: `mlx5_core`, or `mlx5_core.sf` of a scalable function.
fn is_driver(driver: &str) -> bool {
    driver == "mlx5_core" || driver.starts_with("mlx5_core.")
}

impl Card {
    /// Looked up once.
    fn mlx5(&self) -> Option<&Functions> {
        let find = || {
            if !is_driver(&self.about.driver()?) {
                return None;
            }
            let functions = Functions::loaded()?;
            // SAFETY: the context is open, and its device there as long.
            let is_supported = unsafe { (functions.is_supported)((*self.context.as_ptr()).device) };
            is_supported.then_some(functions)
        };
        self.check().ok()?;
        self.mlx5.get_or_init(find).as_ref()
    }

    /// See [`crate::help::Hardware::tree`].
    pub(super) fn has_tree(&self) -> Probed<()> {
        match self.mlx5() {
            Some(_) => Probed::Offered(()),
            None => Probed::NotOffered("its driver is not mlx5, or libmlx5 is older than rdma-core 33".into()),
        }
    }

    /// See [`crate::help::Hardware::node`].
    pub(super) fn make_node(&self, parent: Option<Node>, most: Option<NonZeroU32>) -> Result<Node, Errno> {
        let attr = attributes(parent, most);
        let functions = self.mlx5().ok_or(Errno::OPNOTSUPP)?;
        let mut all = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        self.check()?;
        // SAFETY: the context is open and mlx5's; the parent is there, and `attr` lives across the call.
        let node = Node(made(unsafe { (functions.node_create)(self.context.as_ptr(), &raw const attr) })?);
        all.tree.nodes.push(node);
        Ok(node)
    }

    /// See [`crate::help::Hardware::leaf`].
    pub(super) fn make_leaf(&self, parent: Node) -> Result<Leaf, Errno> {
        let attr = attributes(Some(parent), None);
        let functions = self.mlx5().ok_or(Errno::OPNOTSUPP)?;
        let mut all = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        self.check()?;
        // SAFETY: as above.
        let leaf = Leaf(made(unsafe { (functions.leaf_create)(self.context.as_ptr(), &raw const attr) })?);
        all.tree.leaves.push(leaf);
        Ok(leaf)
    }

    /// See [`crate::help::Hardware::hang`].
    pub(super) fn hang_on(&self, qp: &CardQp, requestor: Leaf, responder: Leaf) -> Result<(), Errno> {
        let functions = self.mlx5().ok_or(Errno::OPNOTSUPP)?;
        // SAFETY: queue pair and leaves are there, since a card that is not closed destroys none that somebody has.
        done(unsafe { (functions.modify_qp)(qp.raw(), requestor.0.as_ptr(), responder.0.as_ptr()) })
    }

    /// See [`crate::help::Hardware::fell`].
    pub(super) fn fell_tree(&self) {
        if let Some(functions) = self.mlx5() {
            let mut all = self.made.lock().unwrap_or_else(PoisonError::into_inner);
            if self.check().is_ok() {
                // SAFETY: the card is open.
                unsafe { functions.destroy(&mut all.tree) };
            }
        }
    }
}

fn attributes(parent: Option<Node>, most: Option<NonZeroU32>) -> SchedAttr {
    SchedAttr {
        parent: parent.map_or(null_mut(), |parent| parent.0.as_ptr()),
        flags: if most.is_some() { MAX_AVG_BW } else { 0 },
        bw_share: 0,
        max_avg_bw: most.map_or(0, NonZeroU32::get),
        comp_mask: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Write as _;
    use std::mem::offset_of;
    use std::process::Command;

    /// By the C compiler: sizes and places, and that each function has the type that it is called with here.
    #[test]
    fn what_is_declared_is_the_headers() {
        let mut text = String::from("#include <infiniband/mlx5dv.h>\n#include <stddef.h>\n");
        let mut same = |what: &str, ours: usize| {
            writeln!(text, "_Static_assert({what} == {ours}, \"ours is {ours}: {}\");", what.replace('"', "")).unwrap();
        };
        same("sizeof(struct mlx5dv_sched_attr)", size_of::<SchedAttr>());
        same("offsetof(struct mlx5dv_sched_attr, parent)", offset_of!(SchedAttr, parent));
        same("offsetof(struct mlx5dv_sched_attr, flags)", offset_of!(SchedAttr, flags));
        same("offsetof(struct mlx5dv_sched_attr, bw_share)", offset_of!(SchedAttr, bw_share));
        same("offsetof(struct mlx5dv_sched_attr, max_avg_bw)", offset_of!(SchedAttr, max_avg_bw));
        same("offsetof(struct mlx5dv_sched_attr, comp_mask)", offset_of!(SchedAttr, comp_mask));
        same("MLX5DV_SCHED_ELEM_ATTR_FLAGS_MAX_AVG_BW", MAX_AVG_BW as usize);
        let types = [
            "bool (*)(struct ibv_device *)",
            "struct mlx5dv_sched_node *(*)(struct ibv_context *, const struct mlx5dv_sched_attr *)",
            "struct mlx5dv_sched_leaf *(*)(struct ibv_context *, const struct mlx5dv_sched_attr *)",
            "int (*)(struct mlx5dv_sched_node *)",
            "int (*)(struct mlx5dv_sched_leaf *)",
            "int (*)(struct ibv_qp *, const struct mlx5dv_sched_leaf *, const struct mlx5dv_sched_leaf *)",
        ];
        assert_eq!(types.len(), SYMBOLS.len());
        for (symbol, kind) in SYMBOLS.iter().zip(types) {
            let symbol = symbol.to_str().unwrap();
            writeln!(text, "_Static_assert(_Generic(&{symbol}, {kind}: 1, default: 0), \"{symbol}\");").unwrap();
        }
        let source = std::env::temp_dir().join(format!("ringfence-mlx5-{}.c", std::process::id()));
        std::fs::write(&source, text).unwrap();
        let compiled = Command::new("cc").args(["-std=gnu11", "-fsyntax-only"]).arg(&source).output().unwrap();
        std::fs::remove_file(&source).unwrap();
        let complaint = String::from_utf8_lossy(&compiled.stderr);
        assert!(compiled.status.success(), "is libibverbs-dev installed? {complaint}");
    }

    #[test]
    fn a_first_node_has_no_cap_and_all_others_the_one_that_they_are_given() {
        let root = attributes(None, None);
        assert!(root.parent.is_null());
        assert_eq!((root.flags, root.bw_share, root.max_avg_bw, root.comp_mask), (0, 0, 0, 0));
        let parent = Node(NonNull::dangling());
        let node = attributes(Some(parent), NonZeroU32::new(1032));
        assert_eq!((node.parent, node.flags, node.max_avg_bw), (parent.0.as_ptr(), 2, 1032));
    }

    #[test]
    fn drivers() {
        let drivers = ["mlx5_core", "mlx5_core.sf", "mlx4_core", "mlx5_core2", "mlx5_ib", ""];
        assert_eq!(drivers.map(is_driver), [true, true, false, false, false, false]);
    }
}
