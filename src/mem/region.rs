//! One range of guest RAM and the host mapping behind it.
//!
//! Before and behind it lies address space without access, so that a mistake in the arithmetic of a device model ends
//! the process and not in whatever the host has mapped next to the guest.

use std::io;
use std::ptr::NonNull;

use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};
use vm_memory::bitmap::BS;
use vm_memory::{
    GuestAddress, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes, GuestUsize,
    MemoryRegionAddress, VolatileSlice,
};

use super::HUGE_PAGE;

/// A range of guest RAM. Unmapped when dropped.
#[derive(Debug)]
pub struct RamRegion {
    start: GuestAddress,
    host: NonNull<u8>,
    len: usize,
    /// The whole mapping, with what cannot be accessed on either side.
    mapping: (NonNull<u8>, usize),
}

// SAFETY: the region owns its mapping, and all access to the bytes goes through volatile or atomic
// operations of vm-memory, which allow the guest and other threads to change them at any time.
unsafe impl Send for RamRegion {}
// SAFETY: as above.
unsafe impl Sync for RamRegion {}

impl RamRegion {
    /// Reserves `len` bytes of host memory for the guest's `start`.
    ///
    /// # Errors
    /// What `mmap(2)` says; `InvalidInput` when the range leaves the address space.
    pub fn new(start: GuestAddress, len: u64) -> io::Result<RamRegion> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let len = usize::try_from(len)
            .ok()
            .filter(|len| *len > 0)
            .ok_or_else(invalid)?;
        start.0.checked_add(len as u64).ok_or_else(invalid)?;
        let mapped = len.checked_add(2 * HUGE_PAGE).ok_or_else(invalid)?;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches nothing of ours.
        let base = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                mapped,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )?
        };
        let base = NonNull::new(base.cast::<u8>()).ok_or_else(invalid)?;
        // At least a page, at most a huge one: the mapping itself starts on a page.
        let skip = match base.as_ptr().align_offset(HUGE_PAGE) {
            0 => HUGE_PAGE,
            skip => skip,
        };
        // SAFETY: `skip` is at most HUGE_PAGE, and the mapping is longer than `len` by twice that.
        let host = unsafe { base.add(skip) };
        let region = RamRegion {
            start,
            host,
            len,
            mapping: (base, mapped),
        };
        // SAFETY: as above, the range lies in the mapping that was just made.
        unsafe {
            mprotect(
                host.as_ptr().cast(),
                len,
                MprotectFlags::READ | MprotectFlags::WRITE,
            )?;
        }
        Ok(region)
    }

    /// Gives the host pages that lie wholly in `len` bytes from `offset` back to the host. They read as zeroes from then
    /// on, and take memory again when they are touched. The part of the range past the region's end is left out.
    ///
    /// # Errors
    /// What `madvise(2)` says.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let page = rustix::param::page_size();
        let end = usize::try_from(offset.saturating_add(len))
            .unwrap_or(self.len)
            .min(self.len);
        let start = usize::try_from(offset)
            .unwrap_or(self.len)
            .min(end)
            .next_multiple_of(page);
        let len = (end - end % page).saturating_sub(start);
        if len == 0 {
            return Ok(());
        }
        // SAFETY: the pages lie in the mapping, which is ours and private, and everyone who reaches the bytes, the guest
        // too, does so by volatile accesses that allow for any change.
        unsafe {
            let at = self.host.as_ptr().add(start);
            rustix::mm::madvise(at.cast(), len, rustix::mm::Advice::LinuxDontNeed)?;
        }
        Ok(())
    }

    /// Where the region starts in this process, a multiple of 2 MiB.
    pub fn host_address(&self) -> u64 {
        self.host.as_ptr() as u64
    }
}

impl Drop for RamRegion {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours alone, and nobody can hold a slice of it beyond our lifetime.
        let _ = unsafe { munmap(self.mapping.0.as_ptr().cast(), self.mapping.1) };
    }
}

impl GuestMemoryRegion for RamRegion {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.len as GuestUsize
    }

    fn start_addr(&self) -> GuestAddress {
        self.start
    }

    fn bitmap(&self) -> BS<'_, ()> {}

    fn get_host_address(&self, address: MemoryRegionAddress) -> Result<*mut u8, GuestMemoryError> {
        let offset = self
            .check_address(address)
            .ok_or(GuestMemoryError::InvalidBackendAddress)?;
        Ok(self.host.as_ptr().wrapping_add(offset.0 as usize))
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, BS<'_, ()>>, GuestMemoryError> {
        let start =
            usize::try_from(offset.0).map_err(|_| GuestMemoryError::InvalidBackendAddress)?;
        let end = start
            .checked_add(count)
            .ok_or(GuestMemoryError::InvalidBackendAddress)?;
        if end > self.len {
            return Err(GuestMemoryError::InvalidBackendAddress);
        }
        // SAFETY: the bytes from `start` to `end` lie inside the mapping, which lives as long as `self`.
        Ok(unsafe { VolatileSlice::new(self.host.as_ptr().add(start), count) })
    }
}

impl GuestMemoryRegionBytes for RamRegion {}
