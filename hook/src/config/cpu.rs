//! How much of the processors a proxy may have: `cpus`, `cpuset` and `cpu-weight` of `[proxy]`.

use crate::units;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use toml::Value;

/// Whose limit it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Limit<T> {
    /// The container's.
    #[default]
    Container,
    /// The administrator's.
    Own(T),
}

/// Processor time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cpus {
    /// As much as the parent cgroup allows.
    Unlimited,
    /// Thousandths of one processor.
    Thousandths(u32),
}

/// Which processors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cpuset {
    /// Those of the parent cgroup.
    Unlimited,
    /// As [`units::cpu_list`] takes them.
    List(String),
}

/// The share of contended processors; 100 is what cgroups have unless somebody says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Weight(pub u32);

/// What the administrator may write instead of `"container"`.
pub trait Own: Sized {
    /// For messages.
    const EXPECTED: &'static str;
    /// What `value` means.
    fn read(value: &Value) -> Option<Self>;
    /// As [`Self::read`] takes it.
    fn show(&self) -> Value;
}

const CONTAINER: &str = "container";
const UNLIMITED: &str = "unlimited";
/// The kernel hands out no less than a millisecond, of periods of 100.
const MIN_THOUSANDTHS: u32 = 10;
/// As many processors as a kernel can have.
const MAX_CPUS: u32 = 8192;

impl Own for Cpus {
    const EXPECTED: &'static str = "\"container\", \"unlimited\" or a number of CPUs from 0.01 to 8192";

    fn read(value: &Value) -> Option<Self> {
        let number = match value {
            Value::String(text) if text == UNLIMITED => return Some(Self::Unlimited),
            Value::Integer(number) => f64::from(i32::try_from(*number).ok()?),
            Value::Float(number) => *number,
            _ => return None,
        };
        let thousandths = (number * 1000.0).round();
        let range = f64::from(MIN_THOUSANDTHS)..=f64::from(MAX_CPUS * 1000);
        range.contains(&thousandths).then_some(Self::Thousandths(thousandths as u32))
    }

    fn show(&self) -> Value {
        match *self {
            Self::Unlimited => UNLIMITED.into(),
            Self::Thousandths(number) if number % 1000 == 0 => i64::from(number / 1000).into(),
            Self::Thousandths(number) => (f64::from(number) / 1000.0).into(),
        }
    }
}

impl Own for Cpuset {
    const EXPECTED: &'static str = "\"container\", \"unlimited\" or a list of CPUs, such as \"0-3,8\"";

    fn read(value: &Value) -> Option<Self> {
        match value.as_str()? {
            UNLIMITED => Some(Self::Unlimited),
            list => units::cpu_list(list).map(|_| Self::List(list.to_owned())),
        }
    }

    fn show(&self) -> Value {
        match self {
            Self::Unlimited => UNLIMITED.into(),
            Self::List(list) => list.as_str().into(),
        }
    }
}

impl Own for Weight {
    const EXPECTED: &'static str = "\"container\" or a whole number from 1 to 10000";

    fn read(value: &Value) -> Option<Self> {
        let weight = value.as_integer().filter(|weight| (1..=10_000).contains(weight))?;
        u32::try_from(weight).ok().map(Self)
    }

    fn show(&self) -> Value {
        i64::from(self.0).into()
    }
}

impl<'de, T: Own> Deserialize<'de> for Limit<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        if value.as_str() == Some(CONTAINER) {
            return Ok(Self::Container);
        }
        let wrong = || de::Error::custom(format!("{value} is not {}", T::EXPECTED));
        T::read(&value).map(Self::Own).ok_or_else(wrong)
    }
}

impl<T: Own> Serialize for Limit<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Container => CONTAINER.serialize(serializer),
            Self::Own(own) => own.show().serialize(serializer),
        }
    }
}
