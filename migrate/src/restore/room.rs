//! Addresses for the pilots of a copy: the same in this process and in all tasks of the copy, and others for each copy that is built at the same time.

use super::plan::free_range;
use std::sync::{Mutex, PoisonError};

/// Addresses that the copies being built in this process have taken: each needs its own, in this process and in its tasks, and not all of them are mapped here.
static TAKEN: Mutex<Vec<(u64, u64)>> = Mutex::new(Vec::new());

/// A free range that no other copy gets until this is dropped.
#[derive(Debug)]
pub struct Room {
    /// First address.
    pub start: u64,
    len: u64,
}

impl Room {
    /// `len` bytes that are free in all of `used`, as [`free_range`] finds them.
    pub fn find(mut used: Vec<(u64, u64)>, len: u64) -> Option<Room> {
        let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        used.extend(taken.iter().copied());
        let start = free_range(&used, len)?;
        taken.push((start, start + len));
        Some(Room { start, len })
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        taken.retain(|r| *r != (self.start, self.start + self.len));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_side_by_side_get_room_of_their_own() {
        let used = vec![(0x1000_0000_0000, 0x1000_0020_0000)];
        let rooms: Vec<Room> = (0..3).map(|_| Room::find(used.clone(), 1 << 21).unwrap()).collect();
        for (k, room) in rooms.iter().enumerate() {
            assert!(room.start >= 0x1000_0020_0000);
            assert!(rooms[..k].iter().all(|r| r.start.abs_diff(room.start) >= 1 << 21));
        }
        let first = rooms[0].start;
        drop(rooms);
        assert_eq!(Room::find(used, 1 << 21).unwrap().start, first);
    }
}
