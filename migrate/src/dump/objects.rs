//! Memory objects of a tree: unlinked files, memfds, shared anonymous memory, found through descriptors and mappings alike.

use crate::image::Object;
use std::{collections::HashMap, os::fd::OwnedFd};

/// Objects by the inode behind them, each once.
#[derive(Debug, Default)]
pub struct ObjectTable {
    index: HashMap<(u64, u64), u32>,
    objects: Vec<Object>,
    sources: Vec<OwnedFd>,
    keys: Vec<(u64, u64)>,
}

/// Objects, descriptors to read them through, and the inodes (device, number) behind them, all in the order of their indices.
pub type Parts = (Vec<Object>, Vec<OwnedFd>, Vec<(u64, u64)>);

impl ObjectTable {
    /// An empty table.
    pub fn new() -> Self {
        Self::default()
    }

    /// The index of the object with inode `ino` on device `dev` (`st_dev` encoding). When it is new, `make` describes it and gives a
    /// descriptor of the agent's own through which the content can be read with pread(2); its error is handed on.
    pub fn get_or_insert<E>(&mut self, dev: u64, ino: u64, make: impl FnOnce() -> Result<(Object, OwnedFd), E>) -> Result<u32, E> {
        if let Some(&i) = self.index.get(&(dev, ino)) {
            return Ok(i);
        }
        let (object, source) = make()?;
        let i = self.objects.len() as u32;
        self.objects.push(object);
        self.sources.push(source);
        self.keys.push((dev, ino));
        self.index.insert((dev, ino), i);
        Ok(i)
    }

    /// The objects so far, in the order of their indices.
    pub fn objects(&self) -> &[Object] {
        &self.objects
    }

    /// All of it.
    pub fn into_parts(self) -> Parts {
        (self.objects, self.sources, self.keys)
    }
}
