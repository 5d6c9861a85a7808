//! Objects of JSON whose values keep the text that they were written in.

use anyhow::Result;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use std::fmt::{self, Write};

/// An object's members in their order, their values as they are written.
#[derive(Debug, Default)]
pub struct Object {
    /// In their order.
    pub members: Vec<(String, Box<RawValue>)>,
}

impl Object {
    /// Parses a whole text; blank and `null` are empty objects, as they are for dockerd.
    pub fn parse(text: &str) -> Result<Self> {
        if matches!(text.trim(), "" | "null") {
            return Ok(Self::default());
        }
        serde_json::from_str(text).map_err(|error| anyhow::anyhow!("its JSON is broken: {error}"))
    }

    /// A member's value.
    pub fn get(&self, key: &str) -> Option<&RawValue> {
        self.members.iter().find(|(name, _)| name == key).map(|(_, raw)| &**raw)
    }

    /// Replaces a member's value, or appends a member.
    pub fn set(&mut self, key: &str, value: Box<RawValue>) {
        match self.members.iter_mut().find(|(name, _)| name == key) {
            Some((_, present)) => *present = value,
            None => self.members.push((key.to_owned(), value)),
        }
    }

    fn write(&self, style: &Style, level: usize) -> Result<String> {
        let mut text = String::from("{");
        for (i, (key, raw)) in self.members.iter().enumerate() {
            text.push_str(if i == 0 { "" } else { "," });
            write!(text, "{}{}:{}{}", style.newline(level), serde_json::to_string(key)?, style.space(), raw.get())?;
        }
        if !self.members.is_empty() {
            text.push_str(&style.newline(level - 1));
        }
        text.push('}');
        Ok(text)
    }

    /// As the value of a member that stands at `level`.
    pub fn to_raw(&self, style: &Style, level: usize) -> Result<Box<RawValue>> {
        Ok(RawValue::from_string(self.write(style, level + 1)?)?)
    }

    /// As a whole file in the style of `text`, its end included.
    pub fn render(&self, text: &str) -> Result<String> {
        let end = if text.trim().is_empty() { "\n" } else { &text[text.trim_end().len()..] };
        Ok(self.write(&Style::of(text), 1)? + end)
    }
}

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Object;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Object, A::Error> {
                let mut object = Object::default();
                while let Some((key, raw)) = map.next_entry::<String, Box<RawValue>>()? {
                    if object.get(&key).is_some() {
                        return Err(serde::de::Error::custom(format!("the key {key:?} is there twice")));
                    }
                    object.members.push((key, raw));
                }
                Ok(object)
            }
        }
        deserializer.deserialize_map(Members)
    }
}

/// How a file is indented.
pub struct Style {
    /// `None` if it is all in one line.
    indent: Option<String>,
    line_end: &'static str,
}

impl Style {
    /// That of `text`.
    pub fn of(text: &str) -> Self {
        let line_end = if text.contains("\r\n") { "\r\n" } else { "\n" };
        let first = text.lines().find(|line| line.starts_with([' ', '\t']) && line.trim_start().starts_with('"'));
        let indent = first.map(|line| line[..line.len() - line.trim_start().len()].to_owned());
        let is_one_line = text.trim().contains(':') && !text.trim().contains('\n');
        Self { indent: if is_one_line { None } else { Some(indent.unwrap_or_else(|| "  ".into())) }, line_end }
    }

    fn newline(&self, level: usize) -> String {
        match &self.indent {
            Some(indent) => format!("{}{}", self.line_end, indent.repeat(level)),
            None => String::new(),
        }
    }

    fn space(&self) -> &'static str {
        if self.indent.is_some() { " " } else { "" }
    }
}
