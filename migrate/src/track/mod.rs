//! Which pages a process has written since they were last sent.
//!
//! Two ways, chosen at run time: [`wp_async`] (userfaultfd with asynchronous write protection and PAGEMAP_SCAN, Linux 6.7) and [`soft_dirty`]
//! (CONFIG_MEM_SOFT_DIRTY). Both answer the same question for one mapping at a time, [`Tracker::scan`]; the caller keeps which pages the
//! destination holds and tells the tracker, so that memory that has vanished is noticed.
//!
//! | | wp-async | soft-dirty |
//! |---|---|---|
//! | stops the process | to make the descriptor, and when mappings are new | at every round, to read and clear at one moment |
//! | cost of a clean GiB | 0.3 to 0.6 ms | 3 to 10 ms |
//! | a new mapping shows as | not registered (EPERM) | all of it dirty |
//! | dropped anonymous pages show as | not armed | absent; once read, as a shared zero page |
//!
//! Neither sees writes through an address space that is not tracked, by write(2) on a descriptor, or holes punched into shared memory. Where such may happen
//! shared memory is compared by content instead: [`crate::source::shared`]; else [`shared`] tracks it.

pub mod ahead;
pub mod listener;
pub mod shared;
pub mod soft_dirty;
pub mod wp_async;

use crate::{
    image::{Backing, Vma},
    pages::PageSet,
    sys::{pagemap::Pagemap, uffd::Userfault},
};
use std::{io, sync::Arc};

/// Which way is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kind {
    /// userfaultfd WP_ASYNC where the kernel has it, else soft-dirty.
    #[default]
    Auto,
    /// userfaultfd with asynchronous write protection.
    WpAsync,
    /// clear_refs and pagemap.
    SoftDirty,
}

/// What a look at one mapping found.
#[derive(Debug, Default)]
pub struct Scan {
    /// Pages with private content written since the last look (or ever, when the mapping is new), to be sent.
    pub dirty: PageSet,
    /// Pages the destination holds that have no private content any more: zeros, or the file's content.
    pub gone: PageSet,
    /// Guard regions seen now.
    pub guards: PageSet,
    /// The mapping was not tracked before: whatever the destination holds of it is stale.
    pub fresh: bool,
}

/// Why a mapping could not be looked at.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// The address space is gone: the process ended or called execve(2).
    #[error("its address space is gone")]
    Gone,
    /// The mapping changed under the look; what is known of it is void.
    #[error("the mapping changed meanwhile")]
    Changed,
    /// The mapping is not tracked yet ([`Tracker::adopt`]); what is known of it is void.
    #[error("the mapping is not tracked")]
    Untracked,
    /// Anything else.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Tracks one address space. Dropped, it leaves nothing behind in the process.
pub trait Tracker: Send + std::fmt::Debug {
    /// Looks at one mapping. `held`: what the destination holds of this address space. While the process runs (`last` false) the pages found are
    /// armed, so that the next look shows what was written since this one. `last`: everything is stopped, nothing is armed.
    fn scan(&mut self, vma: &Vma, held: &PageSet, last: bool) -> Result<Scan, TrackError>;

    /// What of a mapping other threads can look at before its last look: the blocks in which the destination holds pages, and what shows them. None: nothing.
    fn ahead(&self, _vma: &Vma, _held: &PageSet) -> Option<(PageSet, Arc<Pagemap>)> {
        None
    }

    /// The last look at a mapping, with what they have seen. `owed`: pages of it, among those held, that are sent in any case; of them it may say that they were
    /// written where they have content and were not.
    fn last(&mut self, vma: &Vma, held: &PageSet, _owed: &PageSet, _seen: Option<ahead::Seen>) -> Result<Scan, TrackError> {
        self.scan(vma, held, true)
    }

    /// Called when all mappings were looked at, still within the stop if there is one: soft-dirty bits are cleared here.
    fn arm(&mut self) -> io::Result<()>;

    /// Tracks these mappings from now on: whole ones, as they are while the process is stopped. Where nothing has to be done for that, nothing is.
    fn adopt(&mut self, _mappings: &[(u64, u64)]) {}

    /// Whether the process has to be stopped from the first [`Tracker::scan`] of a round to [`Tracker::arm`].
    fn stops(&self) -> bool;

    /// Whether the address space it was made for still exists.
    fn alive(&self) -> bool;
}

/// Takes the marks away that pages of a registered range have from an earlier registration. Only where there are any, which costs no more than a look: to take them
/// from everything would touch every page table entry of the program.
fn clear_marks(pagemap: &Pagemap, uffd: &Userfault, start: u64, end: u64) -> io::Result<()> {
    let mut open = Vec::new();
    pagemap.unarmed(start, end, &mut open)?;
    open.push((end, end));
    let mut at = start;
    for (a, b) in open {
        if at < a {
            uffd.unprotect(at, a)?;
        }
        at = b;
    }
    Ok(())
}

/// Whether pages of this mapping are sent at all: private, and not the kernel's own.
pub fn has_private_pages(v: &Vma) -> bool {
    !v.shared && !matches!(v.backing, Backing::Special(_))
}

/// Whether an untouched page of this mapping shows a file rather than zeros.
pub fn over_file(v: &Vma) -> bool {
    !v.shared && !matches!(v.backing, Backing::Special(_) | Backing::Anonymous)
}

/// The kind that `wanted` comes to on this host. Err: why it cannot be had.
pub fn choose(wanted: Kind) -> Result<Kind, String> {
    let wp = wp_async::available;
    let soft = soft_dirty::available;
    match wanted {
        Kind::WpAsync if wp() => Ok(Kind::WpAsync),
        Kind::WpAsync => Err("this kernel has no userfaultfd with WP_ASYNC and PAGEMAP_SCAN (Linux 6.7)".into()),
        Kind::SoftDirty if soft() => Ok(Kind::SoftDirty),
        Kind::SoftDirty => Err("this kernel has no soft-dirty bits (CONFIG_MEM_SOFT_DIRTY), or they take root".into()),
        Kind::Auto if wp() => Ok(Kind::WpAsync),
        Kind::Auto if soft() => Ok(Kind::SoftDirty),
        Kind::Auto => Err("this kernel has neither userfaultfd WP_ASYNC nor soft-dirty bits".into()),
    }
}
