//! What a card's packets are marked with, by which the network tells kinds of traffic apart: the administrator's, not the application's.

use serde::{Deserialize, Serialize};

macro_rules! numbers {
    ($($(#[$meta:meta])* $name:ident = $most:literal: $what:literal;)*) => {$(
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(try_from = "i64", into = "u8")]
        pub struct $name(u8);

        impl TryFrom<i64> for $name {
            type Error = String;

            fn try_from(number: i64) -> Result<Self, String> {
                match u8::try_from(number) {
                    Ok(known) if number <= $most => Ok(Self(known)),
                    _ => Err(format!("{number} is no {}, which are 0 to {}", $what, $most)),
                }
            }
        }

        impl From<$name> for u8 {
            fn from(number: $name) -> Self {
                number.0
            }
        }
    )*};
}

numbers! {
    /// A service level: InfiniBand's, or a RoCE packet's priority where there is no traffic class.
    ServiceLevel = 15: "service level";
    /// The traffic class of the global route header; a RoCE v2 packet has it as the IP header's: the DSCP, four times.
    TrafficClass = 255: "traffic class";
}

/// What all address vectors have that a card is given for a container.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Marks {
    /// `None`: as the application says.
    pub service_level: Option<ServiceLevel>,
    /// As above.
    pub traffic_class: Option<TrafficClass>,
}

impl Marks {
    /// These, and of `others` what these do not say.
    #[must_use]
    pub fn or(self, others: Self) -> Self {
        Self {
            service_level: self.service_level.or(others.service_level),
            traffic_class: self.traffic_class.or(others.traffic_class),
        }
    }

    /// Whether the application's hold.
    #[must_use]
    pub fn are_none(&self) -> bool {
        *self == Self::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_bounds() {
        assert_eq!(ServiceLevel::try_from(15).map(u8::from), Ok(15));
        assert_eq!(ServiceLevel::try_from(16), Err("16 is no service level, which are 0 to 15".into()));
        assert_eq!(TrafficClass::try_from(255).map(u8::from), Ok(255));
        assert_eq!(TrafficClass::try_from(256), Err("256 is no traffic class, which are 0 to 255".into()));
        assert!(ServiceLevel::try_from(-1).is_err() && TrafficClass::try_from(i64::MAX).is_err());
    }

    #[test]
    fn a_class_says_what_differs() {
        let marks = |text: &str| serde_json::from_str::<Marks>(text).unwrap();
        let device = marks("{\"service-level\": 1, \"traffic-class\": 32}");
        assert_eq!(
            marks("{\"traffic-class\": 104}").or(device),
            marks("{\"service-level\": 1, \"traffic-class\": 104}")
        );
        assert_eq!(Marks::default().or(device), device);
        assert!(marks("{}").are_none() && !device.are_none());
    }
}
