//! Lists of pieces that are made for each request, and allocated once.

use super::Piece;

/// The allocation of a list of [`Piece`]s, which is empty whenever nobody works with it: what a piece borrows ends with the work,
/// the allocation does not.
#[derive(Debug, Default)]
pub struct Pieces(Vec<Piece<'static>>);

impl Pieces {
    /// Works with an empty list.
    #[inline]
    pub fn with<'a, R>(&mut self, work: impl FnOnce(&mut Vec<Piece<'a>>) -> R) -> R {
        let mut list: Vec<Piece<'a>> = std::mem::take(&mut self.0);
        let result = work(&mut list);
        list.clear();
        // There is nothing to convert; the collection takes the allocation over, as the layouts are the same.
        self.0 = list.into_iter().map_while(|_| None).collect();
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_empty_and_has_the_allocation_of_the_one_before() {
        let mut pieces = Pieces::default();
        let fill = |pieces: &mut Pieces, count: usize| {
            let bytes = vec![1; count];
            pieces.with(|list| {
                assert!(list.is_empty());
                list.extend(bytes.iter().map(|byte| Piece::of_own(std::slice::from_ref(byte))));
                (list.as_ptr().addr(), list.capacity())
            })
        };
        let first = fill(&mut pieces, 30);
        for count in [0, 1, 30] {
            assert_eq!(fill(&mut pieces, count), first);
        }
    }
}
