//! How streams are compressed: what holds for all, and what the `[[stream]]` rules of an opener say of some.

use session_proto::session::Compression;
use session_proto::wire::{Codec, Packing, Service};

use crate::config::{Compression as Typed, Config};

/// What holds for streams of which their opener says nothing.
pub(super) fn of_all(config: &Config) -> Compression {
    match config.transport.compression {
        Typed::Auto => Compression::AUTO,
        Typed::Lz4 => Compression::only(Codec::Lz4),
        Typed::Zstd => Compression::only(Codec::Zstd),
        Typed::Off => Compression::default(),
    }
}

/// Codecs that the rules want, for sessions in which this unit opens the streams. Elsewhere the peer would use them for
/// streams of its own, also where this unit is to have none.
pub(super) fn on_request(config: &Config) -> u64 {
    let wanted = config.streams.iter().map(|s| s.service.packing);
    wanted.fold(0, |codecs, packing| {
        codecs
            | match packing {
                Packing::Unsaid | Packing::Off => 0,
                Packing::Auto => Compression::AUTO.codecs,
                Packing::Only(codec) => codec.bit(),
            }
    })
}

/// `service` as the peer is to be told. Once some streams have codecs that others are not to have, it is told of every
/// stream.
pub(super) fn said(config: &Config, service: Service) -> Service {
    let rules = config.streams.iter().map(|s| s.service.packing);
    let says = rules.into_iter().any(|packing| packing != Packing::Unsaid);
    let packing = match service.packing {
        Packing::Unsaid if says => config.transport.compression.packing(),
        packing => packing,
    };
    Service { packing, ..service }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(rest: &str) -> Config {
        let identity = "[identity]\ncertificate = \"c\"\nkey = \"k\"\nca = \"a\"\n";
        let text = format!("{identity}{rest}");
        Config::parse(&text, "test.toml").unwrap()
    }

    #[test]
    fn without_rules_nothing_is_said() {
        let config = config("[transport]\ncompression = \"lz4\"\n");
        assert_eq!(on_request(&config), 0);
        assert_eq!(said(&config, Service::default()), Service::default());
        assert_eq!(of_all(&config), Compression::only(Codec::Lz4));
    }

    #[test]
    fn a_rule_brings_its_codec_and_the_other_streams_are_told_of() {
        let config = config(
            "[[stream]]\nports = [\"22\"]\ncompression = \"zstd\"\n[[stream]]\nlinks = \"bonded\"\n\
             [transport]\ncompression = \"off\"\n",
        );
        assert_eq!(on_request(&config), Codec::Zstd.bit());
        let [ruled, other] = &config.streams[..] else {
            panic!("{:?}", config.streams)
        };
        let packing = |service| said(&config, service).packing;
        assert_eq!(packing(ruled.service), Packing::Only(Codec::Zstd));
        assert_eq!(packing(other.service), Packing::Off);
        assert_eq!(packing(Service::default()), Packing::Off);
    }
}
