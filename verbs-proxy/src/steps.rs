//! Named moments of granting, of copying by a grant, and of taking a grant back.
//!
//! The test build (feature `obedient`) stops, or dies, at the one that a test names: `integration/tests/grants/steps.rs` shows that
//! what has been taken back stays so wherever either proxy is stopped or killed. Every other build knows the names and does nothing.

macro_rules! steps {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// A moment. Its name is what a test says.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Step {
            $($(#[$doc])* $name,)*
        }

        impl Step {
            /// All of them.
            pub const ALL: [Self; [$(stringify!($name)),*].len()] = [$(Self::$name),*];
        }
    };
}

steps! {
    /// Responder: its control thread has heard that something may be granted.
    Wished,
    /// Either: its page of grants was sent.
    PageSent,
    /// Either: it has mapped the other end's page.
    PageTaken,
    /// Owner of memory: it is immutable, and has not been shown.
    Immutable,
    /// Owner of memory: it was shown.
    ShareSent,
    /// The other end: it has mapped that, and cannot use it yet.
    ShareMapped,
    /// The other end: it can use it, and has not said so.
    ShareTaken,
    /// Owner of memory: it knows that it was mapped.
    ShareConfirmed,
    /// Responder: the grant is in its slot, and the requester does not know it.
    SlotWritten,
    /// Responder: the requester was told.
    GrantSent,
    /// Requester: it was told, and has not looked at it.
    GrantCome,
    /// Requester: it uses the grant from now on.
    GrantTaken,
    /// Requester, on the inlined road: it is busy, and has copied nothing.
    Busy,
    /// Requester, on either: a part of a piece was copied, and the next has not begun.
    PartCopied,
    /// Requester, on the inlined road: a request was executed, and the requester is busy.
    Copied,
    /// Requester, on the inlined road: it is not busy any more, and nothing has been told to its application.
    Left,
    /// As [`Self::Busy`], of a piece on the road itself.
    PieceBusy,
    /// As [`Self::Copied`], of a piece.
    PieceCopied,
    /// As [`Self::Left`], of a piece.
    PieceLeft,
    /// Responder: a grant is to be taken back, and holds.
    Clearing,
    /// Responder: its slot was cleared, and nobody has looked whether the requester is busy.
    Cleared,
    /// Responder: the requester was found busy.
    FoundBusy,
    /// Responder: the requester was told that a region is gone.
    Unshared,
    /// Responder: somebody waits until the requester is through.
    Waiting,
    /// Responder: nothing of the requester's lands any more, and the verb has not returned.
    Settled,
    /// Requester: in the midst of a request it has found that the grant does not hold any more.
    Gone,
    /// Requester: it has heard that a region is gone, and has let go of nothing.
    UnshareCome,
    /// Requester: it has let go of it.
    UnshareTaken,
}

#[cfg(feature = "obedient")]
pub(crate) use crate::control::obedient::steps::at;

/// The calling thread is there.
#[cfg(not(feature = "obedient"))]
#[inline(always)]
pub(crate) fn at(_: Step) {}
