// Tiles are not found here.
#pragma once
