//! Huge pages, of which most machines have none until they are asked.

/// How many the machine has; root changes it.
const COUNT: &str = "/proc/sys/vm/nr_hugepages";

/// As many as there were come back when it is dropped.
#[derive(Debug)]
pub struct Reserved {
    before: String,
}

/// Asks the machine for so many more, for a while. It may have fewer to give, or none, which who maps them is told.
#[must_use]
pub fn reserve(more: u64) -> Reserved {
    let before = std::fs::read_to_string(COUNT).unwrap_or_default();
    let count = before.trim().parse::<u64>().unwrap_or_default();
    let _ = std::fs::write(COUNT, (count + more).to_string());
    Reserved { before }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let _ = std::fs::write(COUNT, &self.before);
    }
}
