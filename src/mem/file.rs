//! A file of the host as a range of the guest's physical memory.
//!
//! The mapping is shared: what the guest stores goes into the host's page cache of the file, and from there to the
//! disk when the host finds time or `fsync(2)` asks for it. It is no part of [`GuestRam`](super::GuestRam), so no
//! request can name it as a buffer, and this process never looks into it: only KVM does, on behalf of the guest. That
//! matters because a file can shrink while it is mapped: an access of ours to what is gone would be a SIGBUS. One of
//! the guest's makes KVM_RUN fail with EFAULT, or worse; see [`FileRegion::file_size`].

use std::fs::File;
use std::io;
use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use super::HUGE_PAGE;

/// The first bytes of a file, mapped. Unmapped when dropped.
#[derive(Debug)]
pub struct FileRegion {
    file: File,
    read_only: bool,
    host: NonNull<u8>,
    len: usize,
    /// The whole mapping, which is longer because `host` is aligned.
    mapping: (NonNull<u8>, usize),
}

// SAFETY: the region owns its mapping, and nothing in this process accesses the bytes.
unsafe impl Send for FileRegion {}
// SAFETY: as above.
unsafe impl Sync for FileRegion {}

impl FileRegion {
    /// Maps the first `len` bytes of a file that is open for reading and, unless `read_only`, for writing.
    ///
    /// # Errors
    /// What `mmap(2)` says; `InvalidInput` when the range leaves the address space.
    pub fn map(file: File, len: u64, read_only: bool) -> io::Result<FileRegion> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let len = usize::try_from(len)
            .ok()
            .filter(|len| *len > 0)
            .ok_or_else(invalid)?;
        let reserved = len.checked_add(HUGE_PAGE).ok_or_else(invalid)?;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches nothing of ours.
        let base = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                reserved,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )?
        };
        let base = NonNull::new(base.cast::<u8>()).ok_or_else(invalid)?;
        let skip = base.as_ptr().align_offset(HUGE_PAGE);
        // SAFETY: `skip` is less than HUGE_PAGE, by which the reservation is longer than `len`.
        let host = unsafe { base.add(skip) };
        // From here on its drop undoes what has been mapped.
        let region = FileRegion {
            file,
            read_only,
            host,
            len,
            mapping: (base, reserved),
        };
        let access = if read_only {
            ProtFlags::READ
        } else {
            ProtFlags::READ | ProtFlags::WRITE
        };
        // SAFETY: what the fixed mapping replaces is a part of the reservation above, which is ours and unused.
        unsafe {
            mmap(
                host.as_ptr().cast(),
                len,
                access,
                MapFlags::SHARED | MapFlags::FIXED,
                &region.file,
                0,
            )?;
        }
        Ok(region)
    }

    /// Where the region starts in this process, a multiple of 2 MiB.
    pub fn host_address(&self) -> u64 {
        self.host.as_ptr() as u64
    }

    /// Bytes that are mapped.
    pub fn size(&self) -> u64 {
        self.len as u64
    }

    /// Whether the guest cannot write it.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Bytes that the file has now. If they are fewer than [`FileRegion::size`], the rest of the mapping has nothing
    /// behind it.
    ///
    /// # Errors
    /// What `fstat(2)` says.
    pub fn file_size(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }
}

impl Drop for FileRegion {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours alone, and whoever lets a guest use it holds the region.
        let _ = unsafe { munmap(self.mapping.0.as_ptr().cast(), self.mapping.1) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_is_aligned_for_huge_pages_and_sees_its_file_shrink() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 << 20).unwrap();
        let region = FileRegion::map(file.try_clone().unwrap(), 4 << 20, false).unwrap();
        assert_eq!(region.host_address() % (2 << 20), 0);
        assert_eq!(
            (region.size(), region.file_size().unwrap()),
            (4 << 20, 4 << 20)
        );
        file.set_len(2 << 20).unwrap();
        assert_eq!(
            (region.size(), region.file_size().unwrap()),
            (4 << 20, 2 << 20)
        );
    }

    #[test]
    fn a_file_that_may_only_be_read_is_not_mapped_for_writing() {
        let scratch = tempfile::NamedTempFile::new().unwrap();
        scratch.as_file().set_len(2 << 20).unwrap();
        let open = || File::open(scratch.path()).unwrap();
        let refused = FileRegion::map(open(), 2 << 20, false).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
        assert!(
            FileRegion::map(open(), 2 << 20, true)
                .unwrap()
                .is_read_only()
        );
    }

    #[test]
    fn sizes_that_no_mapping_can_have_are_errors() {
        let file = tempfile::tempfile().unwrap();
        for len in [0, 1 << 52, u64::MAX] {
            assert!(FileRegion::map(file.try_clone().unwrap(), len, true).is_err());
        }
    }
}
