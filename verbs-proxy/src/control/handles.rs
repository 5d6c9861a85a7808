//! Handles: an index and a generation, so that a stale one is noticed.

use rustix::io::Errno;

const INDEX_BITS: u32 = 20;
const INDEX_MASK: u32 = (1 << INDEX_BITS) - 1;

/// Objects of one kind of one connection.
#[derive(Debug)]
pub struct Handles<T> {
    slots: Vec<(u32, Option<T>)>,
    free: Vec<u32>,
}

impl<T> Default for Handles<T> {
    fn default() -> Self {
        Self { slots: Vec::new(), free: Vec::new() }
    }
}

impl<T> Handles<T> {
    /// Adds an object.
    pub fn insert(&mut self, object: T) -> u32 {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push((0, None));
            (self.slots.len() - 1) as u32
        });
        let slot = &mut self.slots[index as usize];
        slot.1 = Some(object);
        // The index stays below the mask: the policy bounds every kind of object far below a million.
        slot.0 << INDEX_BITS | (index & INDEX_MASK)
    }

    fn slot(&mut self, handle: u32) -> Result<&mut (u32, Option<T>), Errno> {
        let slot = self.slots.get_mut((handle & INDEX_MASK) as usize).ok_or(Errno::INVAL)?;
        if slot.0 == handle >> INDEX_BITS && slot.1.is_some() { Ok(slot) } else { Err(Errno::INVAL) }
    }

    /// The object.
    pub fn get(&mut self, handle: u32) -> Result<&mut T, Errno> {
        self.slot(handle)?.1.as_mut().ok_or(Errno::INVAL)
    }

    /// Takes the object out; its handle is stale from then on.
    pub fn remove(&mut self, handle: u32) -> Result<T, Errno> {
        let slot = self.slot(handle)?;
        let object = slot.1.take().ok_or(Errno::INVAL)?;
        slot.0 = (slot.0 + 1) & (u32::MAX >> INDEX_BITS);
        self.free.push(handle & INDEX_MASK);
        Ok(object)
    }

    /// All objects with their handles.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        self.slots.iter().enumerate().filter_map(|(index, (generation, object))| {
            object.as_ref().map(|object| (generation << INDEX_BITS | index as u32, object))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_handle_is_refused() {
        let mut handles = Handles::default();
        let first = handles.insert('a');
        assert_eq!(handles.get(first), Ok(&mut 'a'));
        assert_eq!(handles.remove(first), Ok('a'));
        let second = handles.insert('b');
        assert_ne!(first, second);
        assert_eq!(handles.get(first), Err(Errno::INVAL));
        assert_eq!(handles.remove(first), Err(Errno::INVAL));
        assert_eq!(handles.get(second), Ok(&mut 'b'));
        assert_eq!(handles.get(u32::MAX), Err(Errno::INVAL));
    }
}
