//! What moves the bytes of work requests.

pub mod soft;
