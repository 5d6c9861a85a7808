//! Where an annotation of ours applies.

use super::{Error, KEYS, PREFIX, show};

/// The domain under which annotations are ours.
const DOMAIN: &str = "ringfence.dev";

/// To which containers of a pod an annotation speaks; a later one has precedence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Scope<'a> {
    /// `ringfence.dev/<key>`: all that have it.
    Bare,
    /// `<key>.ringfence.dev/pod`: all of the pod, too.
    Pod,
    /// `<key>.ringfence.dev/container.<name>`: that one.
    Container(&'a str),
}

/// An annotation of ours, whose key is one of [`KEYS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry<'a> {
    pub key: &'static str,
    pub scope: Scope<'a>,
    /// The annotation's key as it was written.
    pub name: &'a str,
    pub value: &'a str,
}

/// Whether the annotation called `name` is ours, be it right or wrong.
pub fn is_ours(name: &str) -> bool {
    split(name).is_some()
}

/// What stands before our domain, if anything, and after it.
fn split(name: &str) -> Option<(Option<&str>, &str)> {
    if let Some(key) = name.strip_prefix(PREFIX) {
        return Some((None, key));
    }
    let (domain, scope) = name.split_once('/')?;
    let key = domain.strip_suffix(DOMAIN)?.strip_suffix('.')?;
    Some((Some(key), scope))
}

impl<'a> Entry<'a> {
    /// Understands the annotation `name`; `None` if it is not ours.
    pub fn parse(name: &'a str, value: &'a str) -> Option<Result<Self, Error>> {
        let (before, after) = split(name)?;
        let (key, scope) = match before {
            None => (after, Some(Scope::Bare)),
            Some(key) => match after.strip_prefix("container.") {
                Some(container) => (key, Some(Scope::Container(container)).filter(|_| !container.is_empty())),
                None => (key, Some(Scope::Pod).filter(|_| after == "pod")),
            },
        };
        let Some(known) = KEYS.into_iter().find(|known| *known == key) else {
            return Some(Err(Error::Unknown { name: show(name) }));
        };
        let entry = |scope| Self { key: known, scope, name, value };
        Some(scope.map(entry).ok_or_else(|| Error::UnknownScope { name: show(name), key: known }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn forms() {
        for (name, expected) in [
            ("ringfence.dev/weight", Some(Ok(("weight", Scope::Bare)))),
            ("weight.ringfence.dev/pod", Some(Ok(("weight", Scope::Pod)))),
            ("max-qp.ringfence.dev/container.app", Some(Ok(("max-qp", Scope::Container("app"))))),
            ("max-qp.ringfence.dev/container.a.b", Some(Ok(("max-qp", Scope::Container("a.b"))))),
            ("ringfence.dev/pod", Some(Err("is unknown"))),
            ("ringfence.dev/", Some(Err("is unknown"))),
            ("wieght.ringfence.dev/pod", Some(Err("is unknown"))),
            (".ringfence.dev/pod", Some(Err("is unknown"))),
            ("a.weight.ringfence.dev/pod", Some(Err("is unknown"))),
            ("weight.ringfence.dev/", Some(Err("names no scope"))),
            ("weight.ringfence.dev/pods", Some(Err("names no scope"))),
            ("weight.ringfence.dev/container.", Some(Err("names no scope"))),
            ("weight.ringfence.dev/container", Some(Err("names no scope"))),
            ("weight.ringfence.dev/weight", Some(Err("names no scope"))),
            ("ringfence.dev", None),
            ("weight.ringfence.dev", None),
            ("weightringfence.dev/pod", None),
            ("ringfence.device/weight", None),
            ("example.com/ringfence.dev/weight", None),
        ] {
            assert_eq!(is_ours(name), expected.is_some(), "{name}");
            let found = Entry::parse(name, "x");
            match (found, expected) {
                (Some(Ok(entry)), Some(Ok(expected))) => assert_eq!((entry.key, entry.scope), expected, "{name}"),
                (Some(Err(error)), Some(Err(expected))) => {
                    assert!(error.to_string().contains(expected), "{name}: {error}");
                }
                (None, None) => {}
                (found, _) => panic!("{name}: {found:?}"),
            }
        }
        assert!(Scope::Bare < Scope::Pod && Scope::Pod < Scope::Container(""));
    }

    proptest! {
        #[test]
        fn nothing_of_our_domain_is_ignored(before in "[a-z.-]{0,12}", after in "[a-z./]{0,12}") {
            let name = format!("{before}.ringfence.dev/{after}");
            match Entry::parse(&name, "") {
                None => prop_assert!(false, "{} is ignored", name),
                Some(Ok(entry)) => prop_assert!(KEYS.contains(&entry.key)),
                Some(Err(_)) => {}
            }
        }
    }
}
