//! OCI image layouts: which image of several, and what it is made of.
//!
//! A layout (OCI image specification, image-layout.md) has an `index.json` that lists manifests, or further indexes,
//! each by its digest; a *manifest* names the configuration and the layers; and everything but the index lies under
//! `blobs/` by its digest. A tag is an annotation in the index. An image for several platforms is an index of one
//! manifest for each.

use oci_spec::image::{
    ANNOTATION_REF_NAME, Arch, Descriptor, DigestAlgorithm, ImageConfiguration, ImageIndex,
    ImageManifest, MediaType, Os, Platform,
};

use super::blobs::Blobs;
use super::stream::Range;
use super::{Error, Result};

/// Indexes within each other.
const NESTING_MAX: usize = 4;
/// Layers of one image.
const LAYERS_MAX: usize = 1000;
/// The full name that containerd and docker give an image in an index.
const CONTAINERD_NAME: &str = "io.containerd.image.name";

/// An image that has been chosen.
pub(super) struct Chosen {
    /// What says everything about it: the digest of the manifest, or of the configuration where there is no manifest.
    pub digest: String,
    /// Names that lead to it.
    pub tags: Vec<String>,
    pub configuration: ImageConfiguration,
    pub layers: Vec<Layer>,
}

/// A layer of an image.
pub(super) struct Layer {
    /// The tar, perhaps compressed.
    pub blob: Range,
    /// The digest of the blob.
    pub digest: Option<String>,
    /// The digest of the tar in it.
    pub diff_id: Option<String>,
}

/// All names in a layout, and all digests that have none.
///
/// # Errors
/// When the index cannot be read.
pub(super) fn tags(blobs: &Blobs) -> Result<Vec<String>> {
    let index = index(blobs, &blobs.document("index.json")?)?;
    let mut names: Vec<String> = index.manifests().iter().map(name).collect();
    names.dedup();
    Ok(names)
}

/// Chooses the image called `reference` (a tag or a digest), or the only one.
///
/// # Errors
/// When there is none for this kind of machine, more than one, or it is not whole.
pub(super) fn choose(blobs: &Blobs, reference: Option<&str>) -> Result<Chosen> {
    let top = index(blobs, &blobs.document("index.json")?)?;
    let mut candidates: Vec<&Descriptor> = top.manifests().iter().filter(|d| is_image(d)).collect();
    if let Some(wanted) = reference {
        candidates.retain(|descriptor| is_called(descriptor, wanted));
        if candidates.is_empty() {
            return Err(Error::NoSuchTag {
                path: blobs.path().to_owned(),
                wanted: wanted.to_owned(),
                available: top.manifests().iter().map(name).collect(),
            });
        }
    }
    let tags: Vec<String> = candidates
        .iter()
        .flat_map(|descriptor| refs(descriptor))
        .collect();
    let all: Vec<String> = candidates
        .iter()
        .map(|descriptor| name(descriptor))
        .collect();
    let others: Vec<String> = candidates.iter().filter_map(|d| platform(d)).collect();
    candidates.retain(|descriptor| fits(descriptor));
    // An image with two names is one image.
    let mut seen = Vec::new();
    candidates.retain(|descriptor| {
        let new = !seen.contains(descriptor.digest());
        seen.push(descriptor.digest().clone());
        new
    });
    match candidates[..] {
        [] if all.is_empty() => Err(blobs.wrong("its index.json lists no image")),
        [] => Err(Error::Platform {
            path: blobs.path().to_owned(),
            available: others,
        }),
        [descriptor] => {
            let mut chosen = follow(blobs, descriptor, 0)?;
            chosen.tags = tags;
            Ok(chosen)
        }
        _ => Err(Error::Ambiguous {
            path: blobs.path().to_owned(),
            available: all,
        }),
    }
}

/// Goes from a descriptor to the manifest for this kind of machine.
fn follow(blobs: &Blobs, descriptor: &Descriptor, depth: usize) -> Result<Chosen> {
    let digest = sha256(blobs, descriptor)?;
    let bytes = blobs.verified(&digest, Some(descriptor.size()))?;
    if !is_index(descriptor.media_type()) {
        return manifest(blobs, digest, &bytes);
    }
    if depth >= NESTING_MAX {
        return Err(blobs.wrong("its indexes lie too deep in each other"));
    }
    let index = index(blobs, &bytes)?;
    let images = || index.manifests().iter().filter(|d| is_image(d));
    // The first that fits is the one to take (image-index.md, "manifests").
    match images().find(|descriptor| fits(descriptor)) {
        Some(descriptor) => follow(blobs, descriptor, depth + 1),
        None => Err(Error::Platform {
            path: blobs.path().to_owned(),
            available: images().filter_map(platform).collect(),
        }),
    }
}

fn manifest(blobs: &Blobs, digest: String, bytes: &[u8]) -> Result<Chosen> {
    let manifest: ImageManifest = serde_json::from_slice(bytes)
        .map_err(|error| blobs.wrong(format!("its manifest cannot be understood ({error})")))?;
    let config = manifest.config();
    let bytes = blobs.verified(&sha256(blobs, config)?, Some(config.size()))?;
    let configuration = configuration(blobs, &bytes)?;
    let diff_ids = configuration.rootfs().diff_ids();
    if manifest.layers().len() != diff_ids.len() {
        return Err(blobs.wrong(format!(
            "it has {} layers but its configuration speaks of {}",
            manifest.layers().len(),
            diff_ids.len()
        )));
    }
    check_count(blobs, diff_ids.len())?;
    let mut layers = Vec::new();
    for (descriptor, diff_id) in manifest.layers().iter().zip(diff_ids) {
        if descriptor.media_type().to_string().ends_with("+encrypted") {
            return Err(blobs.wrong("its layers are encrypted, which sarang does not undo"));
        }
        let digest = sha256(blobs, descriptor)?;
        let blob = blobs.open(&super::blobs::blob_name(&digest))?;
        blobs.check_size("a layer", Some(descriptor.size()), blob.len)?;
        layers.push(Layer {
            blob,
            digest: Some(digest),
            diff_id: Some(diff_id.clone()),
        });
    }
    Ok(Chosen {
        digest,
        tags: Vec::new(),
        configuration,
        layers,
    })
}

/// Takes the configuration of an image, if it is for this kind of machine.
pub(super) fn configuration(blobs: &Blobs, bytes: &[u8]) -> Result<ImageConfiguration> {
    let configuration: ImageConfiguration = serde_json::from_slice(bytes).map_err(|error| {
        blobs.wrong(format!("its configuration cannot be understood ({error})"))
    })?;
    if *configuration.os() != Os::Linux || *configuration.architecture() != Arch::Amd64 {
        return Err(Error::Platform {
            path: blobs.path().to_owned(),
            available: vec![format!(
                "{}/{}",
                configuration.os(),
                configuration.architecture()
            )],
        });
    }
    Ok(configuration)
}

/// More layers than any image has are refused.
pub(super) fn check_count(blobs: &Blobs, layers: usize) -> Result<()> {
    if layers > LAYERS_MAX {
        return Err(blobs.wrong(format!("it has {layers} layers")));
    }
    Ok(())
}

fn index(blobs: &Blobs, bytes: &[u8]) -> Result<ImageIndex> {
    serde_json::from_slice(bytes)
        .map_err(|error| blobs.wrong(format!("its index cannot be understood ({error})")))
}

fn sha256(blobs: &Blobs, descriptor: &Descriptor) -> Result<String> {
    match descriptor.digest().algorithm() {
        DigestAlgorithm::Sha256 => Ok(descriptor.digest().to_string()),
        other => Err(blobs.wrong(format!(
            "it has digests of the kind {other}, and sarang knows sha256 only"
        ))),
    }
}

fn is_index(media_type: &MediaType) -> bool {
    let text = media_type.to_string();
    text == MediaType::ImageIndex.to_string()
        || text == "application/vnd.docker.distribution.manifest.list.v2+json"
}

/// Whether this is an index or the manifest of an image: an index may list signatures and the like besides.
fn is_image(descriptor: &Descriptor) -> bool {
    let text = descriptor.media_type().to_string();
    let manifest = text == MediaType::ImageManifest.to_string()
        || text == "application/vnd.docker.distribution.manifest.v2+json";
    let unknown = platform(descriptor).is_some_and(|platform| platform == "unknown/unknown");
    (manifest || is_index(descriptor.media_type())) && !unknown
}

/// Whether it may be for this kind of machine. One that does not say is looked at more closely later.
fn fits(descriptor: &Descriptor) -> bool {
    let fits = |platform: &Platform| {
        *platform.os() == Os::Linux && *platform.architecture() == Arch::Amd64
    };
    descriptor.platform().as_ref().is_none_or(fits)
}

fn platform(descriptor: &Descriptor) -> Option<String> {
    let platform = descriptor.platform().as_ref()?;
    Some(format!("{}/{}", platform.os(), platform.architecture()))
}

/// The names that an index gives an image.
fn refs(descriptor: &Descriptor) -> Vec<String> {
    let annotations = descriptor.annotations().as_ref();
    let get = |key: &str| {
        annotations
            .and_then(|annotations| annotations.get(key))
            .cloned()
    };
    let mut names: Vec<String> = get(CONTAINERD_NAME).into_iter().collect();
    // The full name ends in the tag, which then says nothing more.
    if let Some(tag) = get(ANNOTATION_REF_NAME)
        && !names.iter().any(|name| name.ends_with(&format!(":{tag}")))
    {
        names.push(tag);
    }
    names
}

/// What a person can call an image by.
fn name(descriptor: &Descriptor) -> String {
    match &refs(descriptor)[..] {
        [name, ..] => name.clone(),
        [] => descriptor.digest().to_string(),
    }
}

fn is_called(descriptor: &Descriptor, wanted: &str) -> bool {
    *descriptor.digest().as_ref() == *wanted
        || refs(descriptor).iter().any(|name| names(name, wanted))
}

/// Whether `wanted` means what has the full name `name`: all of it, or only its tag.
pub(super) fn names(name: &str, wanted: &str) -> bool {
    name == wanted || name.ends_with(&format!(":{wanted}")) || name.ends_with(&format!("/{wanted}"))
}
