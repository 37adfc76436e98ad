//! One kernel's tree of modules and its index.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use super::cache::Cache;
use super::{Error, Module, Need, file};

/// The virtio transport that a guest's devices have.
const TRANSPORT: &str = "virtio_mmio";

/// A kernel's modules.
#[derive(Debug)]
pub struct Tree {
    version: String,
    directory: PathBuf,
    /// Module names, and their files relative to `directory`.
    files: BTreeMap<String, String>,
    /// What each needs, as `modules.dep` has it; `None` when there is no such index.
    needs: Option<BTreeMap<String, Vec<String>>>,
    built_in: BTreeSet<String>,
    /// What is to be loaded before a module if it exists, and after; names of modules or aliases.
    soft: BTreeMap<String, (Vec<String>, Vec<String>)>,
    pub(super) cache: Cache,
}

impl Tree {
    /// Finds the modules of kernel `version`: in `given`, which is a tree or has one in it, or else beside the file
    /// `kernel`, or where they are installed.
    ///
    /// # Errors
    /// When there are none.
    pub fn find(version: &str, given: Option<&Path>, kernel: &Path) -> Result<Tree, Error> {
        Tree::find_in(version, given, kernel, Path::new("/"))
    }

    /// The same, with what is installed below `root`.
    pub(super) fn find_in(
        version: &str,
        given: Option<&Path>,
        kernel: &Path,
        root: &Path,
    ) -> Result<Tree, Error> {
        let below = |root: &Path| {
            ["lib/modules", "usr/lib/modules"].map(|place| root.join(place).join(version))
        };
        let is_tree = |directory: &Path| {
            ["modules.dep", "modules.builtin", "kernel"]
                .iter()
                .any(|name| directory.join(name).exists())
        };
        if let Some(given) = given {
            let places = [given.to_owned(), given.join(version)];
            let places = places.into_iter().chain(below(given));
            let found = places.into_iter().find(|place| is_tree(place));
            let directory = found.ok_or_else(|| Error::NotATree {
                version: version.to_owned(),
                directory: given.to_owned(),
            })?;
            return Tree::read(version, directory);
        }
        // A kernel of an unpacked package is in boot/.
        let kernel = fs::canonicalize(kernel).unwrap_or_else(|_| kernel.to_owned());
        let beside = kernel.parent().and_then(Path::parent).map(below);
        let mut places: Vec<PathBuf> = beside.into_iter().flatten().chain(below(root)).collect();
        places.dedup();
        let found = places.iter().find(|place| is_tree(place));
        let directory = found.cloned().ok_or_else(|| {
            let looked: Vec<String> = places
                .iter()
                .map(|place| place.display().to_string())
                .collect();
            Error::NoTree {
                version: version.to_owned(),
                looked: looked.join(", "),
            }
        })?;
        Tree::read(version, directory)
    }

    /// Reads the index of the tree in `directory`.
    fn read(version: &str, directory: PathBuf) -> Result<Tree, Error> {
        let text = |name: &str| fs::read_to_string(directory.join(name)).ok();
        let built_in = text("modules.builtin").unwrap_or_default();
        let index = text("modules.dep").filter(|index| !index.trim().is_empty());
        let mut tree = Tree {
            version: version.to_owned(),
            built_in: built_in.lines().filter_map(file::name).collect(),
            soft: soft(&text("modules.softdep").unwrap_or_default()),
            files: BTreeMap::new(),
            needs: None,
            cache: Cache::of_user(),
            directory,
        };
        match index {
            Some(index) => tree.read_index(&index),
            None => tree.walk()?,
        }
        Ok(tree)
    }

    /// Takes `modules.dep`: `path: path path …`. The needs of the needs are in it as well.
    fn read_index(&mut self, index: &str) {
        let mut needs = BTreeMap::new();
        for (path, rest) in index.lines().filter_map(|line| line.split_once(':')) {
            let Some(name) = file::name(path) else {
                continue;
            };
            self.files.insert(name.clone(), path.to_owned());
            let rest = rest.split_whitespace().filter_map(file::name);
            needs.insert(name, rest.collect());
        }
        self.needs = Some(needs);
    }

    /// Lists the tree's files when there is no index.
    fn walk(&mut self) -> Result<(), Error> {
        let mut directories = vec![PathBuf::new()];
        while let Some(relative) = directories.pop() {
            let directory = self.directory.join(&relative);
            let entries = fs::read_dir(&directory).map_err(|source| Error::Read {
                path: directory,
                source,
            })?;
            for entry in entries.flatten() {
                let path = relative.join(entry.file_name());
                // Links such as `build` and `source` lead out of the tree.
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    directories.push(path);
                } else if let Some(name) = file::name(&path.to_string_lossy()) {
                    let path = path.to_string_lossy().into_owned();
                    self.files.insert(name, path);
                }
            }
        }
        Ok(())
    }

    /// The directory of the tree.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Reads the modules for `needs`, each behind those that it needs. What is built into the kernel is left out.
    ///
    /// # Errors
    /// When the kernel has no such module, or a file cannot be read or unpacked.
    pub fn load(&self, needs: &[Need]) -> Result<Vec<Module>, Error> {
        let mut order = Order::default();
        self.add(TRANSPORT, &mut order)?;
        for (name, optional) in needs.iter().flat_map(Need::modules) {
            let name = file::normal(name);
            if !optional || self.files.contains_key(&name) {
                self.add(&name, &mut order)?;
            }
        }
        Ok(order.modules)
    }

    /// Adds a module and what it needs to `order`.
    fn add(&self, name: &str, order: &mut Order) -> Result<(), Error> {
        // Before its needs are looked at, so that two that name each other come to an end.
        if !order.seen.insert(name.to_owned()) {
            return Ok(());
        }
        let Some(path) = self.files.get(name) else {
            if self.built_in.contains(name) {
                return Ok(());
            }
            return Err(Error::NoModule {
                version: self.version.clone(),
                module: name.to_owned(),
                directory: self.directory.clone(),
            });
        };
        let module = file::read(&self.directory.join(path), &self.cache)?;
        let needs = match &self.needs {
            Some(needs) => needs.get(name).cloned().unwrap_or_default(),
            None => file::depends(&module),
        };
        let (before, after) = self.soft.get(name).cloned().unwrap_or_default();
        for soft in self.existing(&before) {
            self.add(&soft, order)?;
        }
        // In modules.dep, what is needed most comes last.
        for need in needs.iter().rev() {
            self.add(need, order)?;
        }
        order.modules.push(module);
        for soft in self.existing(&after) {
            self.add(&soft, order)?;
        }
        Ok(())
    }

    /// The modules among `wanted`, which are names or aliases and need not exist.
    fn existing(&self, wanted: &[String]) -> Vec<String> {
        if wanted.is_empty() {
            return Vec::new();
        }
        let aliases = fs::read_to_string(self.directory.join("modules.alias")).unwrap_or_default();
        let known = |name: &String| self.files.contains_key(name);
        let mut found: Vec<String> = wanted
            .iter()
            .map(|name| file::normal(name))
            .filter(known)
            .collect();
        let named = aliases.lines().filter_map(|line| {
            let mut words = line.strip_prefix("alias ")?.split_whitespace();
            let (alias, name) = (words.next()?, words.next()?);
            let is_wanted = wanted.iter().any(|wanted| wanted == alias);
            is_wanted.then(|| file::normal(name))
        });
        found.extend(named.filter(known));
        found
    }
}

/// Modules in the order of loading.
#[derive(Default)]
struct Order {
    seen: BTreeSet<String>,
    modules: Vec<Module>,
}

/// Takes `modules.softdep`: `softdep NAME pre: A B post: C`.
fn soft(text: &str) -> BTreeMap<String, (Vec<String>, Vec<String>)> {
    let mut soft = BTreeMap::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        if words.next() != Some("softdep") {
            continue;
        }
        let Some(name) = words.next() else { continue };
        let lists: &mut (Vec<String>, Vec<String>) = soft.entry(file::normal(name)).or_default();
        // Some modules forget to say when.
        let mut forgotten = Vec::new();
        let mut list = &mut forgotten;
        for word in words {
            match word {
                "pre:" => list = &mut lists.0,
                "post:" => list = &mut lists.1,
                word => list.push(word.to_owned()),
            }
        }
    }
    soft
}
