"""Every file with a generated picture says so, in a form that machines read: one XMP packet.

IPTC's ``DigitalSourceType`` with ``trainedAlgorithmicMedia`` (made by a trained model) is what news agencies, search
engines and the EU's AI Act (Art. 50: machine-readable marking) go by. It says nothing about who asked for what.
"""

from __future__ import annotations

from typing import Final

XMP_KEYWORD: Final = "XML:com.adobe.xmp"
"""Keyword of the international text chunk that holds XMP in a PNG (XMP Specification, part 3, 1.1.5)."""
DIGITAL_SOURCE_TYPE: Final = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
XMP_PACKET: Final = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    f'Iptc4xmpExt:DigitalSourceType="{DIGITAL_SOURCE_TYPE}"/>'
    '</rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)
