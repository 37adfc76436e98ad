//! The entries of a tar (POSIX.1-2017, `pax` utility, "ustar Interchange Format" and "pax Interchange Format"; the GNU
//! extensions as in GNU tar's manual, "Basic Tar Format").
//!
//! A tar is a row of blocks of 512 bytes: for each entry one *header*, then its contents, filled up to whole blocks.
//! What does not fit a header's fields stands in an entry before it: long names in GNU's `L` and `K`, anything at all in
//! `x` (for the next entry) and `g` (for all that follow), whose contents are records `LENGTH KEY=VALUE\n`. The header's
//! fields are taken apart by the `tar` crate; the rest is here because an archive is not trusted: what an entry may
//! make this process remember is bounded, and the values of extended attributes are bytes, not text.

use std::collections::BTreeMap;
use std::io;

use tar::{EntryType, Header};

use super::stream::Input;
use super::tree::Attributes;

/// Bytes in a block.
const BLOCK: u64 = 512;
/// The most bytes of a long name, an extended header or the map of a sparse file.
const EXTENSION_MAX: u64 = 1 << 20;
/// Extended headers in front of one entry.
const EXTENSIONS_MAX: u32 = 64;
/// Seconds since 1970 that ext4 can tell: its timestamps have 34 bits (1901 to 2446).
const SECONDS: std::ops::RangeInclusive<i64> = -(1 << 31)..=(3 << 32) + (1 << 31) - 1;

/// The parts of a sparse file: the first byte and length of each.
pub(super) type Map = Vec<(u64, u64)>;

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Type {
    File,
    Directory,
    Symlink,
    HardLink,
    CharDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
    Fifo,
    /// Something that is not known, with its type in the archive.
    Unknown(u8),
}

#[derive(Debug)]
pub(super) struct Entry {
    /// As it is written in the archive, of any length.
    pub path: Vec<u8>,
    /// Where a link leads.
    pub link: Vec<u8>,
    pub kind: Type,
    pub attributes: Attributes,
    /// Bytes that the file has. 0 for all else.
    pub size: u64,
    /// Where its contents begin in the archive.
    pub offset: u64,
    /// The parts of a sparse file that are in the archive, one after the other: their first byte and length.
    pub map: Option<Map>,
}

/// The records of extended headers.
#[derive(Clone, Debug, Default)]
struct Records {
    values: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Bytes that the headers had.
    read: u64,
}

impl Records {
    /// Adds the records in `bytes`. An empty value takes one away.
    fn add(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        let malformed = || invalid("an extended header is malformed");
        self.read += bytes.len() as u64;
        if self.read > EXTENSION_MAX {
            return Err(invalid(format!(
                "it has extended headers of {} bytes",
                self.read
            )));
        }
        while !bytes.is_empty() {
            let space = bytes.iter().position(|byte| *byte == b' ');
            let (len, _) = bytes.split_at(space.ok_or_else(malformed)?);
            let total: usize = number(len).ok_or_else(malformed)?;
            let record = bytes.get(len.len() + 1..total).ok_or_else(malformed)?;
            let record = record.strip_suffix(b"\n").ok_or_else(malformed)?;
            let equals = record.iter().position(|byte| *byte == b'=');
            let (key, value) = record.split_at(equals.ok_or_else(malformed)?);
            if value.len() > 1 {
                self.values.insert(key.to_vec(), value[1..].to_vec());
            } else {
                self.values.remove(key);
            }
            bytes = bytes.get(total..).ok_or_else(malformed)?;
        }
        Ok(())
    }

    fn get(&self, key: &str) -> Option<&[u8]> {
        self.values.get(key.as_bytes()).map(|value| &value[..])
    }

    fn number<T: std::str::FromStr>(&self, key: &str) -> io::Result<Option<T>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let value = number(value).ok_or_else(|| invalid(format!("its `{key}` is not a number")))?;
        Ok(Some(value))
    }
}

/// Reads the entries of a tar one after the other.
pub(super) struct Entries<R> {
    input: R,
    /// Bytes read so far.
    position: u64,
    /// Bytes of the current entry's contents that have not been read.
    contents: u64,
    /// Bytes after them, up to a whole block.
    padding: u64,
    global: Records,
    /// Whether the end of the archive is marked, as it should be.
    marked_end: bool,
}

impl<R: Input> Entries<R> {
    pub fn new(input: R) -> Entries<R> {
        Entries {
            input,
            position: 0,
            contents: 0,
            padding: 0,
            global: Records::default(),
            marked_end: false,
        }
    }

    /// Bytes read so far.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Whether two blocks of zeros ended the archive, or it just stopped.
    pub fn has_marked_end(&self) -> bool {
        self.marked_end
    }

    /// The next entry, or nothing at the end. What has not been read of the one before is passed over.
    ///
    /// # Errors
    /// When the archive is cut short, is damaged, or needs too much memory.
    pub fn next(&mut self) -> io::Result<Option<Entry>> {
        let mut records = self.global.clone();
        let mut long_path = None;
        let mut long_link = None;
        for _ in 0..=EXTENSIONS_MAX {
            while self.pass()? {}
            let Some(header) = self.header()? else {
                return Ok(None);
            };
            let kind = header.entry_type();
            // These have no contents, whatever the header says.
            let bare = matches!(
                kind,
                EntryType::Link
                    | EntryType::Symlink
                    | EntryType::Char
                    | EntryType::Block
                    | EntryType::Directory
                    | EntryType::Fifo
            );
            let extension = matches!(kind.as_byte(), b'L' | b'K' | b'x' | b'g');
            let stored = header.entry_size();
            let mut size = or_blank(stored, &header.as_old().size, "size")?;
            if !extension && let Some(long) = records.number("size")? {
                size = long;
            }
            if !bare {
                self.contents = size;
                self.padding = (BLOCK - size % BLOCK) % BLOCK;
                size.checked_add(BLOCK).ok_or_else(|| field("size"))?;
            }
            match kind.as_byte() {
                b'L' => long_path = Some(until_nul(self.extension()?)),
                b'K' => long_link = Some(until_nul(self.extension()?)),
                b'x' => records.add(&self.extension()?)?,
                b'g' => {
                    let bytes = self.extension()?;
                    self.global.add(&bytes)?;
                    records = self.global.clone();
                }
                b'M' => return Err(invalid("it is one of several volumes")),
                _ => {
                    let entry = self.entry(&header, &records, long_path, long_link)?;
                    return Ok(Some(entry));
                }
            }
        }
        Err(invalid(format!(
            "it has more than {EXTENSIONS_MAX} extended headers for one entry"
        )))
    }

    /// Reads a part of the current entry's contents. Nothing is left when the result is 0.
    ///
    /// # Errors
    /// When the archive is cut short.
    pub fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = usize::try_from(self.contents).map_or(buffer.len(), |len| len.min(buffer.len()));
        if want == 0 {
            return Ok(0);
        }
        let read = self.input.read(&mut buffer[..want])?;
        if read == 0 {
            return Err(cut_short());
        }
        self.position += read as u64;
        self.contents -= read as u64;
        Ok(read)
    }

    /// The next header; nothing at the end.
    fn header(&mut self) -> io::Result<Option<Header>> {
        let mut header = Header::new_old();
        let mut filled = 0;
        while filled < BLOCK as usize {
            match self.input.read(&mut header.as_mut_bytes()[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(cut_short()),
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.position += BLOCK;
        if header.as_bytes().iter().all(|byte| *byte == 0) {
            self.marked_end = true;
            return Ok(None);
        }
        if !is_header(header.as_bytes()) {
            return Err(invalid(format!(
                "there is no entry where one should be, at byte {}",
                self.position - BLOCK
            )));
        }
        Ok(Some(header))
    }

    /// The contents of an entry that says something about the next one.
    fn extension(&mut self) -> io::Result<Vec<u8>> {
        if self.contents > EXTENSION_MAX {
            return Err(invalid(format!(
                "it has an extended header of {} bytes",
                self.contents
            )));
        }
        let mut bytes = vec![0; self.contents as usize];
        let mut filled = 0;
        while filled < bytes.len() {
            filled += self.read(&mut bytes[filled..])?;
        }
        Ok(bytes)
    }

    fn entry(
        &mut self,
        header: &Header,
        records: &Records,
        long_path: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
    ) -> io::Result<Entry> {
        let text = |key: &str| records.get(key).map(<[u8]>::to_vec);
        let path = text("GNU.sparse.name")
            .or_else(|| text("path"))
            .or(long_path)
            .unwrap_or_else(|| header.path_bytes().into_owned());
        let link = text("linkpath")
            .or(long_link)
            .or_else(|| header.link_name_bytes().map(|link| link.into_owned()))
            .unwrap_or_default();
        let device = || -> io::Result<(u32, u32)> {
            let (major, minor) = (header.device_major(), header.device_minor());
            let number =
                |n: io::Result<Option<u32>>| n.ok().flatten().ok_or_else(|| field("device"));
            Ok((number(major)?, number(minor)?))
        };
        let kind = match header.entry_type().as_byte() {
            // Before ustar, a directory was a file whose name ends in a slash.
            0 | b'0' if path.ends_with(b"/") => Type::Directory,
            0 | b'0' | b'7' | b'S' => Type::File,
            b'1' => Type::HardLink,
            b'2' => Type::Symlink,
            b'3' => device().map(|(major, minor)| Type::CharDevice { major, minor })?,
            b'4' => device().map(|(major, minor)| Type::BlockDevice { major, minor })?,
            b'5' | b'D' => Type::Directory,
            b'6' => Type::Fifo,
            other => Type::Unknown(other),
        };
        let attributes = attributes(header, records)?;
        let (size, map) = match kind {
            Type::File => self.sparse(header, records)?,
            _ => (0, None),
        };
        Ok(Entry {
            path,
            link,
            kind,
            attributes,
            size,
            offset: self.position,
            map,
        })
    }

    /// The size of a file, and its map if it is sparse.
    fn sparse(&mut self, header: &Header, records: &Records) -> io::Result<(u64, Option<Map>)> {
        let (size, map) = if header.entry_type() == EntryType::GNUSparse {
            let gnu = header.as_gnu().ok_or_else(|| field("type"))?;
            let size = gnu.real_size().map_err(|_| field("size"))?;
            (size, self.gnu_map(gnu)?)
        } else if let Some(size) = records.number("GNU.sparse.realsize")? {
            (size, self.pax_map()?)
        } else if let (Some(size), Some(map)) = (
            records.number("GNU.sparse.size")?,
            records.get("GNU.sparse.map"),
        ) {
            let numbers: Option<Vec<u64>> = map.split(|byte| *byte == b',').map(number).collect();
            (size, pairs(&numbers.ok_or_else(|| field("map"))?)?)
        } else if records.get("GNU.sparse.size").is_some() {
            return Err(invalid(
                "it has sparse files in GNU tar's format 0.0, which is not known",
            ));
        } else {
            return Ok((self.contents, None));
        };
        let mut end = 0_u64;
        let mut stored = 0_u64;
        for (start, len) in &map {
            if *start < end {
                return Err(field("map"));
            }
            end = start.checked_add(*len).ok_or_else(|| field("map"))?;
            stored += len;
        }
        if end > size || stored != self.contents {
            return Err(field("map"));
        }
        Ok((size, Some(map)))
    }

    /// The map of a sparse file in GNU's own format: four parts in the header, and more in blocks behind it.
    fn gnu_map(&mut self, header: &tar::GnuHeader) -> io::Result<Map> {
        let mut parts = Vec::new();
        let mut add = |part: &tar::GnuSparseHeader| -> io::Result<()> {
            if !part.is_empty() {
                let offset = part.offset().map_err(|_| field("map"))?;
                let len = part.length().map_err(|_| field("map"))?;
                parts.push((offset, len));
            }
            Ok(())
        };
        header.sparse.iter().try_for_each(&mut add)?;
        let mut more = header.is_extended();
        let mut blocks = 0;
        while more {
            blocks += 1;
            if blocks * BLOCK > EXTENSION_MAX {
                return Err(field("map"));
            }
            let mut block = tar::GnuExtSparseHeader::new();
            self.input.read_exact(block.as_mut_bytes())?;
            self.position += BLOCK;
            block.sparse().iter().try_for_each(&mut add)?;
            more = block.is_extended();
        }
        Ok(parts)
    }

    /// The map of a sparse file in GNU tar's format 1.0: decimal numbers in the first blocks of the contents.
    fn pax_map(&mut self) -> io::Result<Map> {
        let mut text = Vec::new();
        loop {
            if text.len() as u64 >= EXTENSION_MAX || self.contents < BLOCK {
                return Err(field("map"));
            }
            let mut block = [0; BLOCK as usize];
            let mut filled = 0;
            while filled < block.len() {
                filled += self.read(&mut block[filled..])?;
            }
            text.extend(block);
            let mut lines: Vec<&[u8]> = text.split(|byte| *byte == b'\n').collect();
            // The last line has no end yet.
            lines.pop();
            let Some(count) = lines.first() else {
                continue;
            };
            let count: usize = number(count).ok_or_else(|| field("map"))?;
            let Some(lines) = lines
                .get(1..)
                .and_then(|lines| lines.get(..count.checked_mul(2)?))
            else {
                continue;
            };
            let numbers: Option<Vec<u64>> = lines.iter().map(|line| number(line)).collect();
            return pairs(&numbers.ok_or_else(|| field("map"))?);
        }
    }

    /// Passes over a part of what has not been read of the current entry. The result is whether there was any.
    ///
    /// # Errors
    /// When the archive is cut short.
    pub fn pass(&mut self) -> io::Result<bool> {
        let left = self.contents + self.padding;
        if left == 0 {
            return Ok(false);
        }
        let skipped = self.input.skip(left).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => cut_short(),
            _ => error,
        })?;
        self.position += skipped;
        let of_contents = skipped.min(self.contents);
        self.contents -= of_contents;
        self.padding -= skipped - of_contents;
        Ok(true)
    }
}

/// Whether these 512 bytes are the header of an entry: they say themselves what they add up to.
pub(super) fn is_header(block: &[u8]) -> bool {
    if block.len() < BLOCK as usize {
        return false;
    }
    let header = Header::from_byte_slice(&block[..BLOCK as usize]);
    // The field of the sum counts as spaces.
    let sum: u32 = block[..BLOCK as usize]
        .iter()
        .enumerate()
        .map(|(at, byte)| {
            if (148..156).contains(&at) {
                u32::from(b' ')
            } else {
                u32::from(*byte)
            }
        })
        .sum();
    header.cksum().is_ok_and(|stored| stored == sum) && sum != 8 * u32::from(b' ')
}

fn attributes(header: &Header, records: &Records) -> io::Result<Attributes> {
    let old = header.as_old();
    let mode = or_blank(header.mode(), &old.mode, "mode")? & 0o7777;
    let owner = |key: &str, id: io::Result<u64>, bytes: &[u8]| -> io::Result<u32> {
        let id = match records.number(key)? {
            Some(id) => id,
            None => or_blank(id, bytes, key)?,
        };
        u32::try_from(id).map_err(|_| field(key))
    };
    let uid = owner("uid", header.uid(), &old.uid)?;
    let gid = owner("gid", header.gid(), &old.gid)?;
    let mtime = match records.get("mtime") {
        Some(text) => time(text).ok_or_else(|| field("mtime"))?,
        // Some archives have no time.
        None => (i64::try_from(header.mtime().unwrap_or(0)).unwrap_or(0), 0),
    };
    let mut xattrs = BTreeMap::new();
    for (key, value) in &records.values {
        if let Some(name) = key.strip_prefix(b"SCHILY.xattr.")
            && let Ok(name) = std::str::from_utf8(name)
        {
            xattrs.insert(name.to_owned(), value.clone());
        }
    }
    Ok(Attributes {
        mode: mode as u16,
        uid,
        gid,
        mtime: bounded(mtime),
        xattrs,
    })
}

/// The number in a field of a header, or 0 if nothing is written there.
fn or_blank<T: Default>(number: io::Result<T>, bytes: &[u8], name: &str) -> io::Result<T> {
    match number {
        Ok(number) => Ok(number),
        Err(_) if bytes.iter().all(|byte| matches!(byte, 0 | b' ')) => Ok(T::default()),
        Err(_) => Err(field(name)),
    }
}

/// The nearest time that ext4 can tell.
pub(super) fn bounded((seconds, nanoseconds): (i64, u32)) -> (i64, u32) {
    (
        seconds.clamp(*SECONDS.start(), *SECONDS.end()),
        nanoseconds.min(999_999_999),
    )
}

/// A time as pax writes it: seconds with any number of decimals.
fn time(text: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, decimals) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    if !decimals.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let nine: String = decimals
        .chars()
        .chain("000000000".chars())
        .take(9)
        .collect();
    let nanoseconds: u32 = nine.parse().ok()?;
    // Before 1970 the decimals count backwards.
    if whole.starts_with('-') && nanoseconds > 0 {
        Some((seconds.checked_sub(1)?, 1_000_000_000 - nanoseconds))
    } else {
        Some((seconds, nanoseconds))
    }
}

fn number<T: std::str::FromStr>(text: &[u8]) -> Option<T> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

fn pairs(numbers: &[u64]) -> io::Result<Map> {
    let (pairs, rest) = numbers.as_chunks::<2>();
    if !rest.is_empty() {
        return Err(field("map"));
    }
    Ok(pairs.iter().map(|[offset, len]| (*offset, *len)).collect())
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes.iter().position(|byte| *byte == 0);
    bytes.truncate(end.unwrap_or(bytes.len()));
    bytes
}

fn invalid(why: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.into())
}

fn field(name: &str) -> io::Error {
    invalid(format!("the {name} of an entry is malformed"))
}

fn cut_short() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "it is cut short")
}

#[cfg(test)]
mod tests {
    use super::super::stream::Sequential;
    use super::*;

    fn entries(bytes: &[u8]) -> Entries<Sequential<&[u8]>> {
        Entries::new(Sequential(bytes))
    }

    fn first(bytes: &[u8]) -> io::Result<Entry> {
        Ok(entries(bytes).next()?.expect("an entry"))
    }

    fn header(path: &str, kind: EntryType, size: u64) -> Header {
        let mut header = Header::new_gnu();
        header.set_path(path).unwrap();
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_mode(0o640);
        header.set_uid(7);
        header.set_gid(8);
        header.set_mtime(9);
        header.set_cksum();
        header
    }

    /// An archive with the records of an extended header in front of an empty file.
    fn with_records(records: &[(&str, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        builder
            .append_pax_extensions(records.iter().copied())
            .unwrap();
        let file = header("file", EntryType::Regular, 0);
        builder.append(&file, io::empty()).unwrap();
        builder.into_inner().unwrap()
    }

    #[test]
    fn extended_headers_say_what_a_header_cannot() {
        let long = "n/".repeat(200);
        let entry = first(&with_records(&[
            ("path", long.as_bytes()),
            ("uid", b"4000000000"),
            ("mtime", b"1700000000.25"),
            ("SCHILY.xattr.security.capability", b"\x01\n\0 =\xff"),
        ]))
        .unwrap();
        assert_eq!(entry.path, long.as_bytes());
        assert_eq!(
            (entry.attributes.uid, entry.attributes.gid),
            (4_000_000_000, 8)
        );
        assert_eq!(entry.attributes.mtime, (1_700_000_000, 250_000_000));
        let value = &entry.attributes.xattrs["security.capability"];
        assert_eq!(value, b"\x01\n\0 =\xff", "an attribute's value is bytes");
    }

    #[test]
    fn gnu_long_names_are_understood() {
        let long = "n/".repeat(200);
        let mut builder = tar::Builder::new(Vec::new());
        let mut link = header("link", EntryType::Symlink, 0);
        builder.append_link(&mut link, &long, &long).unwrap();
        let entry = first(&builder.into_inner().unwrap()).unwrap();
        assert_eq!((entry.path, entry.link), (long.clone().into(), long.into()));
        assert_eq!(entry.kind, Type::Symlink);
    }

    #[test]
    fn times_have_any_number_of_decimals_and_may_lie_before_1970() {
        for (text, expected) in [
            ("12", Some((12, 0))),
            ("12.5", Some((12, 500_000_000))),
            ("12.1234567899", Some((12, 123_456_789))),
            ("-1.25", Some((-2, 750_000_000))),
            ("-0.5", Some((-1, 500_000_000))),
            ("soon", None),
            ("1.x", None),
            ("", None),
        ] {
            assert_eq!(time(text.as_bytes()), expected, "{text}");
        }
    }

    #[test]
    fn a_damaged_archive_is_an_error_wherever_it_is_damaged() {
        let mut good = tar::Builder::new(Vec::new());
        let file = header("file", EntryType::Regular, 700);
        good.append(&file, &[b'x'; 700][..]).unwrap();
        let good = good.into_inner().unwrap();
        let all = |bytes: &[u8]| -> io::Result<usize> {
            let mut entries = entries(bytes);
            let mut count = 0;
            while entries.next()?.is_some() {
                count += 1;
            }
            Ok(count)
        };
        assert_eq!(all(&good).unwrap(), 1);
        for cut in [1, 511, 513, 1000, 1535] {
            let error = all(&good[..cut]).unwrap_err();
            assert!(error.to_string().contains("cut short"), "{cut}: {error}");
        }
        let mut entries = entries(&good[..1536]);
        while entries.next().unwrap().is_some() {}
        assert!(!entries.has_marked_end());
        let mut bad = good.clone();
        bad[0] ^= 1;
        assert!(all(&bad).unwrap_err().to_string().contains("at byte 0"));
    }

    #[test]
    fn what_an_archive_can_make_this_process_remember_is_bounded() {
        for kind in [b'x', b'g', b'L', b'K'] {
            let header = header("long", EntryType::new(kind), 1 << 40);
            let mut bytes = header.as_bytes().to_vec();
            bytes.extend([b'a'; 4096]);
            let error = first(&bytes).unwrap_err();
            assert!(error.to_string().contains("1099511627776"), "{error}");
        }
    }

    #[test]
    fn extended_headers_without_an_entry_are_not_read_for_ever() {
        let bytes = header("long", EntryType::GNULongName, 0)
            .as_bytes()
            .repeat(66);
        let error = first(&bytes).unwrap_err();
        assert!(error.to_string().contains("more than 64"), "{error}");
        // So are those that say a little each, time and again.
        let record = |key: usize| format!("1000 k{key:04}={}\n", "v".repeat(988));
        let mut records = Records::default();
        let refused = (0..2000).find_map(|key| records.add(record(key).as_bytes()).err());
        assert!(refused.is_some());
    }

    #[test]
    fn malformed_extended_headers_are_refused() {
        for (records, words) in [
            (&[("uid", &b"-1"[..])], "uid"),
            (&[("size", b"many")], "size"),
            (&[("size", b"18446744073709551615")], "size"),
            (&[("mtime", b"soon")], "mtime"),
            (&[("GNU.sparse.size", b"9")], "0.0"),
            (&[("GNU.sparse.realsize", b"9")], "map"),
        ] {
            let error = first(&with_records(records)).unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
        }
        for text in [
            "9", "99 a=b\n", "x a=b\n", "5 ab\n", "7 a=b\n", "2 a=b\n", "0 a=b\n",
        ] {
            assert!(Records::default().add(text.as_bytes()).is_err(), "{text}");
        }
    }

    /// A sparse file in GNU's own format, with one part in the header.
    fn gnu_sparse(offset: u64, len: u64, real: u64) -> Vec<u8> {
        let mut header = header("sparse", EntryType::GNUSparse, len);
        let gnu = header.as_gnu_mut().unwrap();
        gnu.set_real_size(real);
        gnu.sparse[0].set_offset(offset);
        gnu.sparse[0].set_length(len);
        header.set_cksum();
        let mut builder = tar::Builder::new(Vec::new());
        builder.append(&header, &[b'd'; 512][..]).unwrap();
        builder.into_inner().unwrap()
    }

    #[test]
    fn sparse_files_of_gnu_tar_are_understood() {
        let entry = first(&gnu_sparse(1 << 20, 512, 2 << 20)).unwrap();
        assert_eq!((entry.size, entry.offset), (2 << 20, 512));
        assert_eq!(entry.map, Some(vec![(1 << 20, 512)]));
        assert!(first(&gnu_sparse(1 << 20, 512, 1 << 20)).is_err());

        let mut contents = b"1\n4096\n3\n".to_vec();
        contents.resize(512, 0);
        contents.extend(b"abc");
        let mut builder = tar::Builder::new(Vec::new());
        let records: [(&str, &[u8]); 4] = [
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", b"dir/sparse"),
            ("GNU.sparse.realsize", b"8192"),
        ];
        builder.append_pax_extensions(records).unwrap();
        let header = header("dir/GNUSparseFile.0/sparse", EntryType::Regular, 515);
        builder.append(&header, &contents[..]).unwrap();
        let bytes = builder.into_inner().unwrap();
        let mut entries = entries(&bytes);
        let entry = entries.next().unwrap().unwrap();
        assert_eq!((&entry.path[..], entry.size), (&b"dir/sparse"[..], 8192));
        assert_eq!(entry.map, Some(vec![(4096, 3)]));
        let mut buffer = [0; 10];
        assert_eq!(entries.read(&mut buffer).unwrap(), 3);
        assert_eq!(&buffer[..3], b"abc");
        assert!(entries.next().unwrap().is_none() && entries.has_marked_end());
    }

    #[test]
    fn the_long_name_of_an_entry_of_an_unknown_type_is_not_that_of_the_next() {
        let mut builder = tar::Builder::new(Vec::new());
        builder
            .append_pax_extensions([("path", &b"unknown"[..])])
            .unwrap();
        let unknown = header("odd", EntryType::new(b'V'), 3);
        builder.append(&unknown, &b"abc"[..]).unwrap();
        let known = header("known/", EntryType::Regular, 0);
        builder.append(&known, io::empty()).unwrap();
        let bytes = builder.into_inner().unwrap();
        let mut entries = entries(&bytes);
        for (path, kind) in [
            (&b"unknown"[..], Type::Unknown(b'V')),
            (b"known/", Type::Directory),
        ] {
            let entry = entries.next().unwrap().unwrap();
            assert_eq!((&entry.path[..], entry.kind), (path, kind));
        }
    }
}
