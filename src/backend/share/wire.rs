//! Messages of the FUSE protocol, as bytes (Linux, include/uapi/linux/fuse.h, version 7.33).
//!
//! A request is a header of 40 bytes, which says what to do (the opcode), on which file (the node) and for whom (the
//! caller), followed by a structure that depends on the opcode, and by names or data. An answer is a header of 16 bytes
//! with an error or 0, followed by what was asked for. All numbers are little-endian here, as is the guest.
//!
//! Every byte of a request comes from the guest, so the reader here gives an error where a message is shorter than it
//! should be, and nothing that it reads is trusted.

use std::ffi::CStr;

use rustix::fs::{FileType, Statx};
use rustix::io::Errno;

/// Bytes of `struct fuse_in_header`.
pub const HEADER_LEN: u32 = 40;
/// Bytes of `struct fuse_out_header`.
pub const ANSWER_HEADER_LEN: u32 = 16;
/// The most data that one READ or WRITE moves, which INIT tells the guest: bytes, 256 pages.
pub(super) const DATA_MAX: u32 = 1 << 20;
/// The longest request in bytes: the most data, and a page for headers and names.
pub const MESSAGE_MAX: u32 = DATA_MAX + 4096;

/// The node that every guest knows without looking it up (`FUSE_ROOT_ID`).
pub(super) const ROOT: u64 = 1;

/// Bytes of `struct fuse_attr`, `fuse_entry_out` and `fuse_open_out`.
pub(super) const ATTR_LEN: usize = 88;
pub(super) const ENTRY_LEN: usize = 40 + ATTR_LEN;
pub(super) const OPEN_LEN: usize = 16;
/// Bytes of `struct fuse_dirent` before the name.
const DIRENT_LEN: usize = 24;
/// For how long the guest need not ask again for attributes and names: seconds. So long it may take until the guest sees a
/// change that the host makes.
pub(super) const VALID_SECONDS: u64 = 1;

/// On whose behalf a request is made, in the guest's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Caller {
    pub uid: u32,
    pub gid: u32,
}

/// `struct fuse_in_header`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub opcode: u32,
    pub unique: u64,
    pub node: u64,
    pub caller: Caller,
}

impl Header {
    /// Takes a message apart into its header and its body.
    ///
    /// # Errors
    /// The header, if there is a whole one, of a message that says that it is longer than it is, or shorter than its
    /// header.
    pub fn split(message: &[u8]) -> Result<(Header, Body<'_>), Option<Header>> {
        let mut body = Body(message);
        let (len, header) = Header::parse(&mut body).map_err(|_| None)?;
        let rest = (len as usize).checked_sub(HEADER_LEN as usize);
        let body = rest.and_then(|rest| body.0.get(..rest));
        body.map(|body| (header, Body(body))).ok_or(Some(header))
    }

    fn parse(message: &mut Body<'_>) -> Result<(u32, Header), Errno> {
        let len = message.u32()?;
        let header = Header {
            opcode: message.u32()?,
            unique: message.u64()?,
            node: message.u64()?,
            caller: Caller {
                uid: message.u32()?,
                gid: message.u32()?,
            },
        };
        // The process, and extensions that were not agreed on.
        message.skip(8)?;
        Ok((len, header))
    }
}

/// The part of a request that is still to be read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Body<'a>(&'a [u8]);

impl<'a> Body<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Errno> {
        let (bytes, rest) = self.0.split_first_chunk::<N>().ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(*bytes)
    }

    pub fn u32(&mut self) -> Result<u32, Errno> {
        self.take().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Result<u64, Errno> {
        self.take().map(u64::from_le_bytes)
    }

    /// Leaves `len` bytes out.
    pub fn skip(&mut self, len: usize) -> Result<(), Errno> {
        self.0 = self.0.get(len..).ok_or(Errno::INVAL)?;
        Ok(())
    }

    /// The next `len` bytes.
    pub fn bytes(&mut self, len: usize) -> Result<&'a [u8], Errno> {
        let (bytes, rest) = self.0.split_at_checked(len).ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(bytes)
    }

    /// Text that ends with a NUL.
    pub fn text(&mut self) -> Result<&'a CStr, Errno> {
        let text = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::INVAL)?;
        self.skip(text.count_bytes() + 1)?;
        Ok(text)
    }

    /// The name of something in a directory: not empty, not the directory itself or its parent, and no path.
    pub fn name(&mut self) -> Result<&'a CStr, Errno> {
        let name = self.text()?;
        match name.to_bytes() {
            b"" | b"." | b".." => Err(Errno::INVAL),
            bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
            _ => Ok(name),
        }
    }

    /// That nothing follows, such as more after the NUL of a name.
    pub fn end(&self) -> Result<(), Errno> {
        self.0.is_empty().then_some(()).ok_or(Errno::INVAL)
    }
}

/// An answer that is being written. It never grows past the room that the guest has left for it.
#[derive(Debug)]
pub(super) struct Answer {
    bytes: Vec<u8>,
    room: usize,
}

impl Answer {
    /// `room` is the length of the request's writable part in bytes.
    pub fn new(room: u32) -> Answer {
        Answer {
            bytes: vec![0; ANSWER_HEADER_LEN as usize],
            room: room as usize,
        }
    }

    /// Bytes that can still be added.
    pub fn left(&self) -> usize {
        self.room.saturating_sub(self.bytes.len())
    }

    /// To be asked before something is done of which the guest has to hear.
    ///
    /// # Errors
    /// When the guest has not left room for `len` bytes.
    pub fn needs(&self, len: usize) -> Result<(), Errno> {
        (self.left() >= len).then_some(()).ok_or(Errno::INVAL)
    }

    pub fn bytes(&mut self, bytes: &[u8]) -> Result<(), Errno> {
        self.needs(bytes.len())?;
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    pub fn u32(&mut self, value: u32) -> Result<(), Errno> {
        self.bytes(&value.to_le_bytes())
    }

    pub fn u64(&mut self, value: u64) -> Result<(), Errno> {
        self.bytes(&value.to_le_bytes())
    }

    pub fn zeroes(&mut self, len: usize) -> Result<(), Errno> {
        self.needs(len)?;
        self.bytes.resize(self.bytes.len() + len, 0);
        Ok(())
    }

    /// Has `fill` write up to `len` bytes, or as many as there is room for, and keeps as many as it says.
    pub fn fill(
        &mut self,
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<usize, Errno>,
    ) -> Result<usize, Errno> {
        let before = self.bytes.len();
        let len = len.min(self.left());
        self.bytes.resize(before + len, 0);
        let filled = fill(self.bytes.get_mut(before..).unwrap_or_default())?.min(len);
        self.bytes.truncate(before + filled);
        Ok(filled)
    }

    /// `struct fuse_attr`
    pub fn attr(&mut self, stat: &Statx) -> Result<(), Errno> {
        let seconds = |time: i64| time.cast_unsigned();
        self.u64(stat.stx_ino)?;
        self.u64(stat.stx_size)?;
        self.u64(stat.stx_blocks)?;
        self.u64(seconds(stat.stx_atime.tv_sec))?;
        self.u64(seconds(stat.stx_mtime.tv_sec))?;
        self.u64(seconds(stat.stx_ctime.tv_sec))?;
        self.u32(stat.stx_atime.tv_nsec)?;
        self.u32(stat.stx_mtime.tv_nsec)?;
        self.u32(stat.stx_ctime.tv_nsec)?;
        self.u32(stat.stx_mode.into())?;
        self.u32(stat.stx_nlink)?;
        self.u32(stat.stx_uid)?;
        self.u32(stat.stx_gid)?;
        self.u32(device_number(stat.stx_rdev_major, stat.stx_rdev_minor))?;
        self.u32(stat.stx_blksize)?;
        self.u32(0)
    }

    /// `struct fuse_attr_out`
    pub fn attr_out(&mut self, stat: &Statx) -> Result<(), Errno> {
        self.u64(VALID_SECONDS)?;
        self.u64(0)?;
        self.attr(stat)
    }

    /// `struct fuse_entry_out`. A node number stands for one file for good, so there is one generation.
    pub fn entry(&mut self, node: u64, stat: &Statx) -> Result<(), Errno> {
        self.u64(node)?;
        self.u64(0)?;
        self.u64(VALID_SECONDS)?;
        self.u64(VALID_SECONDS)?;
        self.u64(0)?;
        self.attr(stat)
    }

    /// A `struct fuse_entry_out` that says that there is no such name, which the guest remembers too.
    pub fn no_entry(&mut self) -> Result<(), Errno> {
        self.zeroes(16)?;
        self.u64(VALID_SECONDS)?;
        self.zeroes(ENTRY_LEN - 24)
    }

    /// `struct fuse_open_out`
    pub fn open_out(&mut self, handle: u64, flags: u32) -> Result<(), Errno> {
        self.u64(handle)?;
        self.u32(flags)?;
        self.u32(0)
    }

    /// `struct fuse_dirent`
    pub fn dirent(&mut self, entry: &DirEntry<'_>) -> Result<(), Errno> {
        self.needs(dirent_len(entry.name))?;
        self.u64(entry.ino)?;
        self.u64(entry.next)?;
        self.u32(u32::try_from(entry.name.len()).unwrap_or(u32::MAX))?;
        self.u32(match entry.kind {
            FileType::Unknown => 0,
            kind => kind.as_raw_mode() >> 12,
        })?;
        self.bytes(entry.name)?;
        self.zeroes(dirent_len(entry.name) - DIRENT_LEN - entry.name.len())
    }

    /// The whole answer, with an error or without. Empty when the guest has no room for a header.
    pub fn finish(mut self, unique: u64, result: Result<(), Errno>) -> Vec<u8> {
        if self.room < ANSWER_HEADER_LEN as usize {
            return Vec::new();
        }
        let error = match result {
            Ok(()) => 0,
            Err(error) => {
                self.bytes.truncate(ANSWER_HEADER_LEN as usize);
                -error.raw_os_error()
            }
        };
        let len = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        let header = [
            &len.to_le_bytes()[..],
            &error.to_le_bytes(),
            &unique.to_le_bytes(),
        ];
        for (to, from) in self.bytes.iter_mut().zip(header.concat()) {
            *to = from;
        }
        self.bytes
    }
}

/// What a directory says of a name.
#[derive(Clone, Copy, Debug)]
pub(super) struct DirEntry<'a> {
    pub ino: u64,
    /// Where the directory goes on after this.
    pub next: u64,
    pub kind: FileType,
    pub name: &'a [u8],
}

/// Bytes that a name takes in an answer to READDIR: a multiple of 8.
pub(super) fn dirent_len(name: &[u8]) -> usize {
    (DIRENT_LEN + name.len()).next_multiple_of(8)
}

/// A device number in 32 bits, as Linux packs it for user space (`new_encode_dev`).
fn device_number(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}
