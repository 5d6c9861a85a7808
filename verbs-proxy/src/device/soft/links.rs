//! All links of a plane, by names that are never given twice.

use super::link::Link;

/// Names a link: its place, and which of the links that had this place it is.
///
/// A name outlives its link in notices, queue pairs and the control thread's hands; it must not come to mean the link that
/// has the place next, which may lead to another port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LinkId {
    slot: u32,
    generation: u64,
}

#[derive(Debug)]
struct Slot {
    generation: u64,
    link: Option<Box<Link>>,
    /// Nothing goes over it any more; its memory waits for [`Links::remove`].
    ended: bool,
}

/// The links.
#[derive(Debug, Default)]
pub struct Links {
    slots: Vec<Slot>,
    generation: u64,
    live: usize,
}

impl Links {
    /// Whether there is none.
    #[inline(always)]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.live == 0
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.live
    }

    /// The link of this name.
    #[inline(always)]
    #[must_use]
    pub fn get(&self, id: LinkId) -> Option<&Link> {
        let slot = self.slots.get(id.slot as usize)?;
        if slot.generation != id.generation || slot.ended { None } else { slot.link.as_deref() }
    }

    /// As [`Self::get`].
    #[inline(always)]
    #[must_use]
    pub fn get_mut(&mut self, id: LinkId) -> Option<&mut Link> {
        let slot = self.slots.get_mut(id.slot as usize)?;
        if slot.generation != id.generation || slot.ended { None } else { slot.link.as_deref_mut() }
    }

    /// Places to look at, each with [`Self::at`].
    #[inline(always)]
    #[must_use]
    pub fn places(&self) -> usize {
        self.slots.len()
    }

    /// The name of the link that has this place now.
    #[inline(always)]
    #[must_use]
    pub fn at(&self, place: usize) -> Option<LinkId> {
        let slot = self.slots.get(place)?;
        (slot.link.is_some() && !slot.ended).then_some(LinkId { slot: place as u32, generation: slot.generation })
    }

    /// All links.
    pub fn iter(&self) -> impl Iterator<Item = &Link> {
        self.slots.iter().filter(|slot| !slot.ended).filter_map(|slot| slot.link.as_deref())
    }

    /// All links.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Link> {
        self.slots.iter_mut().filter(|slot| !slot.ended).filter_map(|slot| slot.link.as_deref_mut())
    }

    /// Adds a link.
    pub(crate) fn insert(&mut self, link: Link) -> LinkId {
        let place = self.slots.iter().position(|slot| slot.link.is_none()).unwrap_or_else(|| {
            self.slots.push(Slot { generation: 0, link: None, ended: false });
            self.slots.len() - 1
        });
        let port = link.port;
        self.generation += 1;
        self.slots[place] = Slot { generation: self.generation, link: Some(Box::new(link)), ended: false };
        self.live += 1;
        self.rank(port);
        LinkId { slot: place as u32, generation: self.generation }
    }

    /// Ends a link where its memory must not be given up, because that may take long: that is for [`Self::remove`].
    pub(crate) fn end(&mut self, id: LinkId) -> Option<u16> {
        let port = self.get(id)?.port;
        self.slots[id.slot as usize].ended = true;
        self.live -= 1;
        self.rank(port);
        Some(port)
    }

    /// Takes a link out, whether it has ended or not.
    pub(crate) fn remove(&mut self, id: LinkId) -> Option<Box<Link>> {
        self.end(id);
        let slot = self.slots.get_mut(id.slot as usize)?;
        if slot.generation == id.generation { slot.link.take() } else { None }
    }

    /// The link to a port that both ends prefer, among those that can be used.
    ///
    /// Two proxies that make a link to each other at the same time have two, of which both ends use the one whose maker has
    /// the lower LID: on two ways a request could overtake the answer to what came before it, and programs that wait for the
    /// completions of two queues on one channel count on the order that causes have.
    #[must_use]
    pub fn to(&self, port: u16) -> Option<LinkId> {
        let links = (0..self.slots.len()).filter_map(|place| self.at(place));
        let maker =
            |id: &LinkId| self.get(*id).filter(|link| link.port == port && link.is_open()).map(|link| link.maker);
        links.filter_map(|id| Some((maker(&id)?, id))).min_by_key(|(maker, _)| *maker).map(|(_, id)| id)
    }

    /// Sees which of the links to a port is to be used.
    pub(crate) fn rank(&mut self, port: u16) {
        let preferred = self.to(port);
        for place in 0..self.slots.len() {
            let Some(id) = self.at(place) else { continue };
            if let Some(link) = self.get_mut(id).filter(|link| link.port == port) {
                link.superseded = preferred.is_some_and(|preferred| preferred != id);
            }
        }
    }
}
