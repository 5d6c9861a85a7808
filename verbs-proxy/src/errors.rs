//! What the kernel's errors mean to those that go on.

use rustix::io::Errno;

/// Whether it was short of something for a moment: that says nothing of what was asked for, which may be asked for again.
#[must_use]
pub fn passes(error: Errno) -> bool {
    matches!(
        error,
        Errno::AGAIN | Errno::INTR | Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM | Errno::TOOMANYREFS
    )
}

/// The error that a library gives by its number; `EIO` if the kernel has none of it.
#[must_use]
pub fn numbered(number: i32) -> Errno {
    match number {
        1..4096 => Errno::from_raw_os_error(number),
        _ => Errno::IO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_are_none_are_no_trouble() {
        assert_eq!([0, -12, 4096, i32::MIN, i32::MAX].map(numbered), [Errno::IO; 5]);
        assert_eq!([12, 4095].map(|number| numbered(number).raw_os_error()), [12, 4095]);
    }
}
