//! JSON objects of which some members are replaced, and every other stays as it was written: byte by byte, with numbers of
//! any size, and in order.

use serde::Deserializer;
use serde::de::{MapAccess, Visitor};
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::fmt;

/// An object's members, as written.
#[derive(Debug)]
pub struct Object<'a> {
    members: Vec<(Cow<'a, str>, Cow<'a, str>)>,
}

impl<'a> Object<'a> {
    /// Reads one object, all of whose text is checked to be JSON, at any depth.
    pub fn parse(text: &'a str) -> serde_json::Result<Self> {
        let mut json = serde_json::Deserializer::from_str(text);
        let object = json.deserialize_map(Members)?;
        json.end()?;
        Ok(object)
    }

    /// The text of the member `name`; the last one of several, as runtimes take it, and nothing for null.
    pub fn get(&self, name: &str) -> Option<&str> {
        let (_, value) = self.members.iter().rfind(|(key, _)| is(key, name))?;
        Some(&**value).filter(|value| *value != "null")
    }

    /// Whether `name` is there more than once, in whatever case, since runc does not care for it: some runtimes take the first
    /// then, some the last, and some a mixture.
    pub fn repeats(&self, name: &str) -> bool {
        let says = |key: &str| serde_json::from_str::<String>(key).is_ok_and(|key| key.eq_ignore_ascii_case(name));
        self.members.iter().filter(|(key, _)| says(key)).count() > 1
    }

    /// How `name` is written that is there in another case only: for some runtimes that is the same, for others nothing.
    pub fn misspells(&self, name: &str) -> Option<String> {
        let keys = self.members.iter().filter_map(|(key, _)| serde_json::from_str::<String>(key).ok());
        keys.into_iter().find(|key| key.eq_ignore_ascii_case(name) && key != name)
    }

    /// Replaces the member `name`, in its place, or adds it at the end.
    pub fn set(&mut self, name: &str, value: String) {
        match self.members.iter_mut().rfind(|(key, _)| is(key, name)) {
            Some(member) => member.1 = value.into(),
            None => self.members.push((quote(name).into(), value.into())),
        }
    }

    /// The whole object.
    pub fn to_text(&self) -> String {
        let length = self.members.iter().map(|(key, value)| key.len() + value.len() + 2).sum::<usize>();
        let mut text = String::with_capacity(length + 2);
        text.push('{');
        for (i, (key, value)) in self.members.iter().enumerate() {
            text.push_str(if i == 0 { "" } else { "," });
            text.push_str(key);
            text.push(':');
            text.push_str(value);
        }
        text.push('}');
        text
    }
}

/// The elements of an array, as written.
pub fn elements(text: &str) -> serde_json::Result<Vec<&str>> {
    let elements: Vec<&RawValue> = serde_json::from_str(text)?;
    Ok(elements.into_iter().map(RawValue::get).collect())
}

/// The array of these elements.
pub fn array(elements: &[&str]) -> String {
    format!("[{}]", elements.join(","))
}

/// A JSON string.
pub fn quote(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// Whether the JSON string `key` says `name`, which has nothing to escape.
fn is(key: &str, name: &str) -> bool {
    let inner = &key[1..key.len() - 1];
    inner == name || (inner.contains('\\') && serde_json::from_str::<String>(key).is_ok_and(|key| key == name))
}

struct Members;

impl<'de> Visitor<'de> for Members {
    type Value = Object<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut members = Vec::with_capacity(16);
        while let Some((key, value)) = map.next_entry::<&RawValue, &RawValue>()? {
            members.push((key.get().into(), value.get().into()));
        }
        Ok(Object { members })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::Value;

    #[test]
    fn all_else_stays_as_written() {
        let text =
            r#"{ "z":1e400, "a" : 123456789012345678901234567890.10, "\u00e4/\/":"\u0041\ud800", "b":{ "x" : [ ] }}"#;
        let mut object = Object::parse(text).unwrap();
        object.set("b", "true".into());
        object.set("c", "null".into());
        assert_eq!(
            object.to_text(),
            r#"{"z":1e400,"a":123456789012345678901234567890.10,"\u00e4/\/":"\u0041\ud800","b":true,"c":null}"#
        );
    }

    #[test]
    fn members_are_found_by_what_their_names_say() {
        let object = Object::parse(r#"{"hooks":1,"h\u006foks":2,"n":null,"x":"hooks"}"#).unwrap();
        assert_eq!((object.get("hooks"), object.get("n"), object.get("m")), (Some("2"), None, None));
        assert!(object.repeats("hooks") && !object.repeats("n") && !object.repeats("m"));
        assert!(Object::parse(r#"{"hooks":1,"Hooks":2}"#).unwrap().repeats("hooks"));
    }

    #[test]
    fn depth_does_not_matter() {
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
        assert_eq!(Object::parse(&deep).unwrap().to_text(), deep);
    }

    #[test]
    fn what_is_no_object_is_refused() {
        for text in ["", "null", "[]", "1", "{", "{}x", "{}{}", r#"{"a"}"#, r#"{"a":}"#, r#"{"a":[}"#, "{a:1}", "{1:1}"]
        {
            assert!(Object::parse(text).is_err(), "{text}");
        }
    }

    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            ".{0,8}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 4, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::btree_map(".{0,6}", inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_what_was_read(members in proptest::collection::btree_map(".{0,6}", value(), 0..6)) {
            let all = Value::Object(members.into_iter().collect());
            let compact = all.to_string();
            prop_assert_eq!(Object::parse(&compact).unwrap().to_text(), compact);
            let pretty = serde_json::to_string_pretty(&all).unwrap();
            let written = Object::parse(&pretty).unwrap().to_text();
            prop_assert_eq!(serde_json::from_str::<Value>(&written).unwrap(), all);
        }

        #[test]
        fn it_accepts_what_serde_json_accepts(text in r#"[{}\[\]:,"a1 \\n]{0,12}"#) {
            let object = serde_json::from_str::<Value>(&text).is_ok_and(|value| value.is_object());
            prop_assert_eq!(Object::parse(&text).is_ok(), object);
        }
    }
}
