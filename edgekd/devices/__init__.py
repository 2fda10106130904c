"""Devices elsewhere: bundles measured over the user's own ssh. Here what needs no torch; `devices.bench` measures."""

from __future__ import annotations

from .known import DIRECTORY, Device, add_device, devices_file, find_device, known_devices

__all__ = ["DIRECTORY", "Device", "add_device", "devices_file", "find_device", "known_devices"]
