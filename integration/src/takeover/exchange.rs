//! How the programs of a test tell each other things: files in a directory that all of them see.

use anyhow::{Context, Result};
use std::path::PathBuf;
use std::time::Duration;

/// Where containers see the directory.
pub const INSIDE: &str = "/exchange";

/// The directory.
#[derive(Clone, Debug)]
pub struct Exchange(pub PathBuf);

impl Exchange {
    /// Says something, whole or not at all.
    pub fn say(&self, name: &str, words: &[String]) -> Result<()> {
        let partial = self.0.join(format!("{name}.part"));
        std::fs::write(&partial, words.join(" ")).with_context(|| format!("cannot write {}", partial.display()))?;
        std::fs::rename(&partial, self.0.join(name))?;
        Ok(())
    }

    /// Waits until something is said.
    pub fn hear(&self, name: &str) -> Result<Vec<String>> {
        let path = self.0.join(name);
        crate::command::wait_until(&format!("{}", path.display()), Duration::from_secs(20), || path.exists())?;
        Ok(std::fs::read_to_string(path)?.split(' ').map(str::to_owned).collect())
    }
}

/// What a port's program says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Its port's LID.
    pub lid: u16,
    /// Its port's GID.
    pub gid: [u8; 16],
    /// Its queue pair.
    pub qp_num: u32,
    /// Its memory region's key.
    pub rkey: u32,
    /// Where the region begins.
    pub iova: u64,
}

impl Endpoint {
    /// As words for [`Exchange::say`].
    #[must_use]
    pub fn words(&self) -> Vec<String> {
        let gid = u128::from_be_bytes(self.gid);
        [self.lid.into(), gid, self.qp_num.into(), self.rkey.into(), self.iova.into()]
            .map(|word: u128| word.to_string())
            .into()
    }

    /// From words.
    pub fn of(words: &[String]) -> Result<Self> {
        let number = |index: usize| -> Result<u128> { Ok(words.get(index).context("too few words")?.parse()?) };
        Ok(Self {
            lid: number(0)?.try_into()?,
            gid: number(1)?.to_be_bytes(),
            qp_num: number(2)?.try_into()?,
            rkey: number(3)?.try_into()?,
            iova: number(4)?.try_into()?,
        })
    }
}
