//! Images built in memory, whole and broken in every way that a file can be.

use std::io::Write;

use super::*;
use crate::mem;

fn ram(mib: u64) -> GuestRam {
    mem::allocate(&[(GuestAddress(0), mib << 20)]).unwrap()
}

fn load_bytes(kernel: &[u8]) -> Result<InitState, Error> {
    load(&ram(64), &request(kernel, &[]))
}

fn request<'a>(kernel: &'a [u8], initrds: &'a [(&'a str, &'a [u8])]) -> Request<'a> {
    Request {
        kernel,
        kernel_name: "kernel",
        initrds,
        command_line: "console=ttyS0",
        ram_bytes: 64 << 20,
        rsdp: 0xe_0000,
    }
}

/// A 64-bit ELF with segments of (physical address, file bytes, bytes in memory), and perhaps a note.
fn elf(segments: &[(u64, &[u8], u64)], note: Option<(&[u8], u32, &[u8])>) -> Vec<u8> {
    let count = segments.len() + usize::from(note.is_some());
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    image.extend([2, 0, 0x3e, 0, 1, 0, 0, 0]);
    let entry = segments.first().map_or(0, |segment| segment.0);
    image.extend(
        [entry, 64, 0]
            .iter()
            .flat_map(|value: &u64| value.to_le_bytes()),
    );
    image.extend([0; 4]);
    image.extend(
        [64_u16, 56, count as u16, 64, 0, 0]
            .iter()
            .flat_map(|value| value.to_le_bytes()),
    );
    let mut data = Vec::new();
    let mut header = |kind: u32, address: u64, bytes: &[u8], len: u64, data: &mut Vec<u8>| {
        let offset = 64 + 56 * count as u64 + data.len() as u64;
        image.extend([kind, 7].iter().flat_map(|value| value.to_le_bytes()));
        let fields = [offset, address, address, bytes.len() as u64, len, 4];
        image.extend(fields.iter().flat_map(|value| value.to_le_bytes()));
        data.extend(bytes);
        data.resize(data.len().next_multiple_of(4), 0);
    };
    for (address, bytes, len) in segments {
        header(1, *address, bytes, *len, &mut data);
    }
    if let Some((owner, kind, desc)) = note {
        let mut bytes = Vec::new();
        for value in [owner.len() as u32 + 1, desc.len() as u32, kind] {
            bytes.extend(value.to_le_bytes());
        }
        bytes.extend(owner);
        bytes.resize(
            bytes.len().next_multiple_of(4) + if owner.len() % 4 == 0 { 4 } else { 0 },
            0,
        );
        bytes.extend(desc);
        header(4, 0, &bytes, bytes.len() as u64, &mut data);
    }
    image.extend(data);
    image
}

fn kernel_elf() -> Vec<u8> {
    elf(
        &[(0x100_0000, &[0x90; 5000], 9000)],
        Some((b"Linux", 0x100, b"salt")),
    )
}

/// A bzImage around a payload that is compressed already, with the size word appended.
fn bzimage(payload: &[u8], size: u32) -> Vec<u8> {
    let mut image = vec![0; 1024];
    image[0x1f1] = 1;
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
    image[0x22c..0x230].copy_from_slice(&0x7fff_ffff_u32.to_le_bytes());
    image[0x236] = 1;
    image[0x248..0x24c].copy_from_slice(&0x400_u32.to_le_bytes());
    image[0x24c..0x250].copy_from_slice(&(payload.len() as u32 + 4).to_le_bytes());
    image[0x258..0x260].copy_from_slice(&0x100_0000_u64.to_le_bytes());
    image[0x260..0x264].copy_from_slice(&0x10_0000_u32.to_le_bytes());
    image.extend([0xcc; 0x400]);
    image.extend(payload);
    image.extend(size.to_le_bytes());
    image
}

fn lz4(data: &[u8]) -> Vec<u8> {
    let block = lz4_flex::block::compress(data);
    let mut frame = vec![0x02, 0x21, 0x4c, 0x18];
    frame.extend((block.len() as u32).to_le_bytes());
    frame.extend(block);
    frame
}

/// The image in each compression that can be made here: name, payload without the size word.
fn compressed(data: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(data).unwrap();
    let mut gzip = gzip.finish().unwrap();
    gzip.truncate(gzip.len() - 4); // its size word is the payload's
    let mut bzip2 = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
    bzip2.write_all(data).unwrap();
    // As the kernel's build calls xz: with the filter for x86 code.
    let mut options = lzma_rust2::XzOptions::with_preset(1);
    options.prepend_pre_filter(lzma_rust2::FilterType::BcjX86, 0);
    let mut xz = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
    xz.write_all(data).unwrap();
    let zstd =
        ruzstd::encoding::compress_to_vec(data, ruzstd::encoding::CompressionLevel::Uncompressed);
    vec![
        ("gzip", gzip),
        ("bzip2", bzip2.finish().unwrap()),
        ("xz", xz.finish().unwrap()),
        ("lz4", lz4(data)),
        ("zstd", zstd),
    ]
}

#[test]
fn a_linux_elf_is_entered_by_the_linux_protocol_and_a_pvh_elf_by_pvh() {
    let memory = ram(64);
    let image = kernel_elf();
    let state = load(&memory, &request(&image, &[])).unwrap();
    assert_eq!(
        state.entry,
        Entry::Linux64 {
            rip: 0x100_0000,
            boot_params: layout::BOOT_PARAMS
        }
    );
    assert_eq!(
        memory
            .read_obj::<u8>(GuestAddress(0x100_0000 + 4999))
            .unwrap(),
        0x90
    );
    assert_eq!(
        memory
            .read_obj::<u32>(GuestAddress(layout::BOOT_PARAMS + 0x202))
            .unwrap(),
        { u32::from_le_bytes(*b"HdrS") }
    );
    let note = 0x20_0010_u32.to_le_bytes();
    let image = elf(&[(0x20_0000, &[0x90; 64], 64)], Some((b"Xen", 18, &note)));
    let state = load_bytes(&image).unwrap();
    assert_eq!(
        state.entry,
        Entry::Pvh {
            rip: 0x20_0010,
            start_info: layout::PVH_START_INFO
        }
    );
}

#[test]
fn a_bzimage_is_unpacked_on_the_host_whatever_its_compression() {
    let inner = kernel_elf();
    for (name, payload) in compressed(&inner) {
        let state = load_bytes(&bzimage(&payload, inner.len() as u32))
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(
            matches!(
                state.entry,
                Entry::Linux64 {
                    rip: 0x100_0000,
                    ..
                }
            ),
            "{name}"
        );
        assert!(state.warnings.is_empty(), "{name}");
    }
}

#[test]
fn a_payload_that_only_the_guest_can_unpack_gives_one_warning() {
    for payload in [
        &[0x5d, 0, 0, 0, 4][..],
        &[0x89, b'L', b'Z', b'O', 0],
        b"what is this?",
    ] {
        let state = load_bytes(&bzimage(payload, 100)).unwrap();
        assert_eq!(state.warnings.len(), 1);
        assert!(matches!(
            state.entry,
            Entry::Linux64 {
                rip: 0x100_0200,
                ..
            }
        ));
    }
}

#[test]
fn a_damaged_payload_is_an_error_not_a_fallback() {
    let inner = kernel_elf();
    let size = inner.len() as u32;
    for (name, payload) in compressed(&inner) {
        let cut = &payload[..payload.len() / 2];
        assert!(
            matches!(load_bytes(&bzimage(cut, size)), Err(Error::Damaged { .. })),
            "{name}"
        );
        let huge = load_bytes(&bzimage(&payload, u32::MAX))
            .unwrap_err()
            .to_string();
        assert!(
            huge.contains("claims to unpack to 4095 MiB"),
            "{name}: {huge}"
        );
        let wrong = load_bytes(&bzimage(&payload, size - 1));
        assert!(matches!(wrong, Err(Error::Damaged { .. })), "{name}");
    }
    let mut outside = bzimage(b"x", 1);
    outside[0x24c..0x250].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(matches!(load_bytes(&outside), Err(Error::Damaged { .. })));
}

#[test]
fn elf_files_that_lie_about_their_segments_are_refused() {
    let long = [0x90; 64];
    let cases: &[(Vec<u8>, &str)] = &[
        (elf(&[(0x8000, &long, 64)], None), "below 1 MiB"),
        (elf(&[(0x1_0000_0000, &long, 64)], None), "--mem"),
        (elf(&[(0x10_0000, &long, 1 << 50)], None), "--mem"),
        (elf(&[(u64::MAX - 8, &long, 64)], None), "address space"),
        (elf(&[(0x10_0000, &long, 32)], None), "longer in the file"),
        (
            elf(&[(0x10_0000, &long, 4096), (0x10_0800, &long, 64)], None),
            "overlap",
        ),
        (elf(&[], None), "without segments"),
        (
            elf(
                &[(0x10_0000, &long, 64)],
                Some((b"Xen", 18, &[0, 0, 0, 0x40])),
            ),
            "entry point",
        ),
    ];
    for (image, words) in cases {
        let error = load_bytes(image).unwrap_err().to_string();
        assert!(error.contains(words), "{error:?} lacks {words:?}");
    }
}

#[test]
fn initrds_are_concatenated_below_the_top_of_memory() {
    let memory = ram(64);
    let initrds: [(&str, &[u8]); 2] = [("a", &[1; 5]), ("b", &[2; 4])];
    load(&memory, &request(&kernel_elf(), &initrds)).unwrap();
    let at = memory
        .read_obj::<u32>(GuestAddress(layout::BOOT_PARAMS + 0x218))
        .unwrap();
    let len = memory
        .read_obj::<u32>(GuestAddress(layout::BOOT_PARAMS + 0x21c))
        .unwrap();
    assert_eq!((at % 4096, len), (0, 12));
    let mut bytes = [0; 12];
    memory
        .read_slice(&mut bytes, GuestAddress(at.into()))
        .unwrap();
    assert_eq!(bytes, [1, 1, 1, 1, 1, 0, 0, 0, 2, 2, 2, 2]);
    let zeroes = vec![0; 60 << 20];
    let big: [(&str, &[u8]); 1] = [("big", &zeroes)];
    let error = load(&memory, &request(&kernel_elf(), &big))
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with("big does not fit") && error.contains("--mem"),
        "{error}"
    );
}

#[test]
fn no_cut_or_flipped_byte_brings_the_loader_down() {
    let note = 0x20_0010_u32.to_le_bytes();
    let inner = elf(&[(0x20_0000, &[0x90; 64], 64)], Some((b"Xen", 18, &note)));
    let mut images: Vec<Vec<u8>> = compressed(&inner)
        .into_iter()
        .map(|(_, payload)| bzimage(&payload, inner.len() as u32))
        .collect();
    images.push(inner);
    let memory = ram(64);
    for image in images {
        for len in (0..image.len()).step_by(7) {
            let _ = load(&memory, &request(&image[..len], &[]));
        }
        for at in 0..image.len() {
            let mut flipped = image.clone();
            flipped[at] ^= 1 << (at % 8);
            let _ = load(&memory, &request(&flipped, &[]));
        }
    }
}

/// What the fuzzer starts from. With `SARANG_SEEDS=write` in the environment, writes `fuzz/corpus/loader`; otherwise sees
/// that the loader takes what is there for what it is named.
#[test]
fn the_images_in_the_corpus_are_loaded_or_refused_as_their_names_say() {
    let corpus = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/loader");
    if std::env::var_os("SARANG_SEEDS").is_some_and(|value| value == "write") {
        std::fs::create_dir_all(&corpus).unwrap();
        let code = [0x90; 64];
        let note = 0x20_0010_u32.to_le_bytes();
        let linux = elf(
            &[(0x100_0000, &code, 9000)],
            Some((b"Linux", 0x100, b"salt")),
        );
        let mut images = vec![
            (
                "elf-pvh".to_owned(),
                elf(&[(0x20_0000, &code, 64)], Some((b"Xen", 18, &note))),
            ),
            (
                "refused-elf-overflow".to_owned(),
                elf(&[(u64::MAX - 8, &code, 64)], None),
            ),
            (
                "refused-elf-overlap".to_owned(),
                elf(&[(0x10_0000, &code, 4096), (0x10_0800, &code, 64)], None),
            ),
            (
                "refused-elf-past-ram".to_owned(),
                elf(&[(0xd000_0000, &code, 64)], None),
            ),
            (
                "bzimage-unpacks-itself".to_owned(),
                bzimage(b"what is this?", 100),
            ),
        ];
        for (name, payload) in compressed(&linux) {
            let whole = bzimage(&payload, linux.len() as u32);
            let cut = bzimage(&payload[..payload.len() / 2], linux.len() as u32);
            images.push((format!("bzimage-{name}"), whole));
            images.push((format!("refused-bzimage-{name}-cut"), cut));
        }
        images.push(("elf-linux".to_owned(), linux));
        for (name, image) in images {
            std::fs::write(corpus.join(name), image).unwrap();
        }
    }
    let Ok(seeds) = std::fs::read_dir(&corpus) else {
        // A published package has no fuzz targets.
        return;
    };
    for seed in seeds {
        let path = seed.unwrap().path();
        let refused = path.to_string_lossy().contains("refused");
        let loaded = load_bytes(&std::fs::read(&path).unwrap());
        assert_eq!(loaded.is_err(), refused, "{}", path.display());
    }
}
