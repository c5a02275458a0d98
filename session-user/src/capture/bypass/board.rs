//! What the agent and the program tell each other: an eBPF array in this process's memory, so that it costs no call.

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::atomic::{AtomicU64, Ordering};

use aya::maps::MapData;
use memmap2::{MmapOptions, MmapRaw};
use session_ebpf_common::BypassSlot;

/// All slots.
#[derive(Debug)]
pub struct Board {
    memory: MmapRaw,
    slots: u32,
}

impl Board {
    /// Maps an array of so many slots that was made for that (`BPF_F_MMAPABLE`, Linux 5.5).
    pub fn new(array: &MapData, slots: u32) -> io::Result<Self> {
        let bytes = slots as usize * size_of::<BypassSlot>();
        let fd = array.fd().as_fd().as_raw_fd();
        let memory = MmapOptions::new().len(bytes).map_raw(fd)?;
        Ok(Self { memory, slots })
    }

    /// How many slots there are.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// Begins a slot: so much was read.
    pub fn set(&self, slot: u32, read: u64) {
        let (cell, left) = self.cells(slot);
        left.store(0, Ordering::Relaxed);
        cell.store(read, Ordering::Release);
    }

    /// Adds what was read.
    pub fn add(&self, slot: u32, bytes: u64) {
        self.cells(slot).0.fetch_add(bytes, Ordering::Release);
    }

    /// Whether the connection goes by TCP for good; true once.
    pub fn take_left(&self, slot: u32) -> bool {
        let (_, left) = self.cells(slot);
        left.load(Ordering::Relaxed) != 0 && left.swap(0, Ordering::Relaxed) != 0
    }

    /// [`BypassSlot::read`] and [`BypassSlot::left`].
    fn cells(&self, slot: u32) -> (&AtomicU64, &AtomicU64) {
        assert!(slot < self.slots, "slots are given out by this agent");
        // SAFETY: the mapping begins at a page, holds `slots` of these aligned values, lives as long as `self`, and is
        // only used through such references and by the programs, whose accesses are of whole words.
        unsafe {
            let first = self
                .memory
                .as_mut_ptr()
                .cast::<c_void>()
                .cast::<BypassSlot>();
            let slot = first.add(slot as usize);
            let (read, left) = (&raw mut (*slot).read, &raw mut (*slot).left);
            (AtomicU64::from_ptr(read), AtomicU64::from_ptr(left))
        }
    }
}
